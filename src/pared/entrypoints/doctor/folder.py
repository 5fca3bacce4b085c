"""How this environment would load a folder, and why it would load it wrongly: one function a question."""

import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from packaging.version import InvalidVersion, Version

from pared.checkpoint.format import LOADER_NAME, NOTICE, ParedConfig
from pared.checkpoint.portable import loader_source
from pared.checkpoint.verify import require_tensors
from pared.entrypoints.doctor.finding import Finding, State
from pared.entrypoints.doctor.machine import CPUINFO, units_of
from pared.entrypoints.doctor.stored import INDEX, WEIGHTS, Header, Stored
from pared.environment import versions
from pared.errors import ParedError
from pared.io.files import files_under
from pared.io.record import MANIFEST, SUMS, recorded, require_own_sum, require_whole
from pared.memory import available_memory, format_size
from pared.models.stored import TORCH_DTYPES
from pared.models.trust import trusted
from pared.names import called
from pared.schema.manifest import Manifest

AGAIN = "fetch or make the folder again"
ADAPTER = "adapter_config.json"
NAMED = 3  # as many of many are named
# what reads a slot of another tool
READERS = {
    "awq": "gptqmodel",
    "bitsandbytes": "bitsandbytes",
    "compressed-tensors": "compressed_tensors",
    "gptq": "gptqmodel",
    "quanto": "optimum",
    "torchao": "torchao",
}
# ends of the names of tensors that only modules of the map have
OURS = (".down.weight", ".up.weight", ".values", ".bits", ".codes", ".scales")


def loading(folder: Stored) -> Iterator[Finding]:
    """Yield everything about a folder as it lies on the disk."""
    for why in folder.unreadable:
        yield Finding("files", "wrong", why, AGAIN)
    if not folder.config:
        return
    checks: tuple[Callable[[Stored], Iterator[Finding]], ...] = (
        digests, manifest, slot, guard, architecture, loader, weights, strangers, dtypes, made_with, room,
    )  # fmt: skip
    for check in checks:
        yield from check(folder)


def digests(folder: Stored) -> Iterator[Finding]:
    """Compare every file with its recorded SHA-256."""
    try:
        if (folder.path / MANIFEST).is_file():
            require_own_sum(folder.path / MANIFEST)
        files = recorded(folder.path)
    except ParedError as error:
        yield Finding("digests", "wrong", str(error))
        return
    if files is None:
        yield Finding("digests", "note", f"neither {MANIFEST} nor {SUMS} lists any: a damaged file is not noticed")
        return
    changed = [why for name in sorted(files) if (why := _changed(folder.path, name, files)) is not None]
    yield from (Finding("digests", "wrong", why) for why in changed)
    if not changed:
        yield Finding("digests", "ok", f"{len(files)} files are as they were written")


def _changed(folder: Path, name: str, files: Mapping[str, str]) -> str | None:
    try:
        require_whole(folder, {name: files[name]})
    except ParedError as error:
        return str(error)
    return None


def manifest(folder: Stored) -> Iterator[Finding]:
    """Say whether the manifest can be read."""
    if not (folder.path / MANIFEST).exists():
        yield Finding("manifest", "note", f"no {MANIFEST}: what it answered when it was made is not known")
        return
    try:
        made = Manifest.read(folder.path)
    except ParedError as error:
        yield Finding("manifest", "wrong", str(error))
        return
    yield Finding("manifest", "ok", f"{made.model['name']}, {made.recipe.method}, {made.plan.budget}")


def slot(folder: Stored) -> Iterator[Finding]:
    """Say what the slot for quantisation holds, and whether this environment reads it."""
    what, method = "quantization", folder.quantization.get("quant_method")
    renamed = sorted(name for name in folder.tensors if name.endswith(OURS))
    if folder.is_ours:
        config = _map_of(folder)
        if isinstance(config, str):
            yield Finding(what, "wrong", config)
            return
        kinds = Counter(entry["kind"] for entry in config.modules.values())
        counted = ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))
        yield Finding(what, "ok", f"a map of version {config.format_version}: {counted or 'no modules'}")
    elif renamed and folder.manifest:
        by = f"the slot quantization_config holds {method!r}" if method else "config.json has lost its map"
        yield Finding(what, "wrong", f"{by}, and {len(renamed)} tensors, the first is {renamed[0]}, need that of pared",
                      AGAIN)  # fmt: skip
    elif method:
        reader = READERS.get(str(method), str(method).replace("-", "_"))
        here = reader.isidentifier() and find_spec(reader) is not None
        state: State = "ok" if here else "wrong"
        yield Finding(what, state, f"{method}, which the package {reader} reads",
                      "" if here else f"it is not installed: pip install {reader}")  # fmt: skip
    else:
        yield Finding(what, "ok", "none: the weights are plain")


def _map_of(folder: Stored) -> ParedConfig | str:
    """Return the map of a folder of pared, or why it cannot be read."""
    try:
        return ParedConfig(**folder.quantization)
    except (TypeError, ValueError) as error:
        return str(error)


def guard(folder: Stored) -> Iterator[Finding]:
    """Say whether a program that knows nothing of pared refuses the folder."""
    config = _map_of(folder) if folder.is_ours else ""
    if isinstance(config, str):
        return
    if config.guard is None:
        yield Finding("guard", "ok", "not needed: without pared its smaller layers do not fit, and it is refused")
    elif NOTICE in folder.tensors:
        yield Finding("guard", "ok", "a program that neither imports pared nor trusts its code refuses the folder")
    else:
        missing = "missing: a program that neither imports pared nor trusts its code warns, and fills layers at random"
        yield Finding("guard", "note", missing, "import pared, or save the loaded model again")


def architecture(folder: Stored) -> Iterator[Finding]:
    """Say whether the class of the model is known here."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    what, kind, refs = "architecture", folder.config.get("model_type"), _refs(folder)
    if "AutoConfig" in refs:
        state: State = "ok" if trusted() else "note"
        advice = "" if trusted() else f"read it, and give {called('trust_remote_code', 'True')}"
        yield Finding(what, state, f"{kind!r} is code of its own ({refs['AutoConfig']})", advice)
    elif kind not in CONFIG_MAPPING_NAMES:
        made = _versions(folder).get("transformers")
        advice = f"install {made}, which it was made with" if made else "update transformers"
        yield Finding(what, "wrong", f"transformers {versions()['transformers']} does not know {kind!r}", advice)
    else:
        yield Finding(what, "ok", ", ".join(map(str, folder.config.get("architectures") or [kind])))


def loader(folder: Stored) -> Iterator[Finding]:
    """Say whether the code that lies in the folder is there, and is that of this version."""
    refs = _refs(folder)
    files = {f"{ref.rpartition('.')[0]}.py" for ref in refs.values() if "--" not in ref and "." in ref}
    missing = sorted(name for name in files if not (folder.path / name).is_file())
    if missing:
        state: State = "note" if missing == [f"{LOADER_NAME}.py"] and "AutoConfig" not in refs else "wrong"
        yield Finding("loader", state, f"{', '.join(missing)} is missing, and config.json names it: "
                      "trust_remote_code=True fails", AGAIN)  # fmt: skip
        return
    ours = folder.path / f"{LOADER_NAME}.py"
    if not ours.is_file():
        return
    own = "AutoConfig" in refs or ours.read_text(encoding="utf-8").startswith(loader_source())
    whose = f"{ours.name} is that of this version" if own else f"{ours.name} is of another version of pared"
    yield Finding("loader", "ok", f"{whose}; where pared is imported, pared reads the folder")


def weights(folder: Stored) -> Iterator[Finding]:
    """Say whether every tensor is there, of its shape, and in the file that transformers reads."""
    if not folder.tensors:
        if not folder.unreadable:
            yield Finding("weights", "wrong", "no tensors in .safetensors files", AGAIN)
        return
    if folder.index and (folder.path / WEIGHTS).is_file():
        yield Finding("weights", "wrong", f"both {WEIGHTS} and {INDEX}: transformers reads the first alone",
                      f"remove what is not of this model, or {AGAIN}")  # fmt: skip
        return
    lacking = sorted(
        name for name, file in folder.index.items() if folder.tensors.get(name, Header("", "", ())).file != file
    )
    if lacking:
        yield Finding("weights", "wrong", f"{len(lacking)} tensors are not in the files that {INDEX} names, the first "
                      f"is {lacking[0]}", AGAIN)  # fmt: skip
        return
    if folder.is_ours and ("AutoConfig" not in _refs(folder) or trusted()):  # else its configuration is not read
        try:
            require_tensors(folder.path)
        except ParedError as error:
            yield Finding("weights", "wrong", str(error))
            return
    size = sum(file.stat().st_size for file in folder.path.glob("*.safetensors"))
    yield Finding("weights", "ok", f"{len(folder.tensors)} tensors, {format_size(size)}")


def strangers(folder: Stored) -> Iterator[Finding]:
    """Name what lies in the folder and changes what is loaded from it."""
    if (folder.path / ADAPTER).is_file():
        why = f"{ADAPTER} lies in the folder: where peft is installed, transformers loads the model that it names"
        yield Finding("adapter", "wrong", why, "move the adapter into a folder of its own")
    try:
        files = recorded(folder.path) or {}
    except ParedError:
        return
    others = [name for name in sorted(files_under(folder.path)) if name not in {*files, MANIFEST, SUMS, ADAPTER}]
    if files and others:
        more = f" and {len(others) - NAMED} more" if len(others) > NAMED else ""
        yield Finding("others", "note", f"{', '.join(others[:NAMED])}{more}: files that pared did not write")


def dtypes(folder: Stored) -> Iterator[Finding]:
    """Say what the weights are stored in, and what they are loaded as."""
    floating = [one for one in folder.tensors.values() if one.dtype in ("F64", "F32", "F16", "BF16")]
    counted = Counter(one.dtype for one in floating if 0 not in one.shape)  # the guard holds no numbers
    if not counted:
        return
    stored = ", ".join(f"{count} tensors {_dtype(name)}" for name, count in counted.most_common())
    declared = folder.config.get("dtype") or folder.config.get("torch_dtype")
    most = _dtype(counted.most_common(1)[0][0])
    if declared is not None and declared != most:
        yield Finding("dtype", "note", f"{stored}; config.json says {declared}, which they are loaded as",
                      f'give dtype="{most}" for what is stored')  # fmt: skip
    else:
        yield Finding("dtype", "ok", stored)
    if most == "bfloat16" and not _has_units():
        yield Finding("speed", "note", "no units for bfloat16 here", 'dtype="float32" may be faster')


def _dtype(name: str) -> str:
    return str(TORCH_DTYPES[name]).removeprefix("torch.")


def _has_units() -> bool:
    """Whether this machine multiplies in bfloat16, as far as is known."""
    import torch

    if torch.cuda.is_available() or not CPUINFO.is_file():
        return True
    return bool(units_of(CPUINFO.read_text(encoding="ascii", errors="replace")))


def made_with(folder: Stored) -> Iterator[Finding]:
    """Compare the versions here with those that the folder was made with."""
    here = versions()
    for name, made in sorted(_versions(folder).items()):
        if name == "python" or name not in here or here[name] == made:
            continue
        older = _is_older(here[name], made)
        state: State = "note" if older else "ok"
        yield Finding(name, state, f"{here[name]} here, made with {made}",
                      f"if it does not load, install {made}" if older else "")  # fmt: skip


def _versions(folder: Stored) -> Mapping[str, str]:
    found: Any = folder.manifest.get("versions")
    return {name: one for name, one in found.items() if isinstance(one, str)} if isinstance(found, dict) else {}


def _is_older(here: str, made: str) -> bool:
    try:
        return Version(here) < Version(made)
    except InvalidVersion:
        return True


def room(folder: Stored) -> Iterator[Finding]:
    """Say whether memory holds the weights."""
    needed = sum(os.stat(file).st_size for file in folder.path.glob("*.safetensors"))
    available = available_memory()
    if available is None or needed == 0:
        return
    if needed > available.bytes:
        why = f"{format_size(needed)} of weights, {format_size(available.bytes)} may be taken: {available.limit}"
        yield Finding("memory", "note", why, "from_pretrained would fail; pared reads it block by block")
    else:
        yield Finding("memory", "ok", f"{format_size(needed)} of weights, of {format_size(available.bytes)}")


def _refs(folder: Stored) -> dict[str, str]:
    """Return what ``auto_map`` names, by Auto class."""
    found = folder.config.get("auto_map")
    return {auto: ref for auto, ref in found.items() if isinstance(ref, str)} if isinstance(found, dict) else {}
