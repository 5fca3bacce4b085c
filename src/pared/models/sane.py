"""Checks of a model's folder before anything is built from it; a damaged or hostile one is reported at once."""

import copy
import os
import re
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pared.errors import DamagedError, ParedError
from pared.io.guarded import brief, read_json

if TYPE_CHECKING:
    from torch import nn
    from transformers import PretrainedConfig

# Limits; no model comes near them.
LARGEST_NUMBER = 2**53
MOST_PARTS = 20_000
MOST_ARCHITECTURES = 16
PARTS = re.compile(r"(layers?|blocks?|experts?|depths?|stages?|heads?|groups?)$")
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".msgpack", ".h5", ".gguf")
# Numbers that a byte of a file may stand for; the tightest formats have 8.
NUMBERS_A_BYTE, NUMBERS_UNASKED = 16, 2**24


def require_sane(folder: Path, name: str) -> None:
    """Refuse a folder whose ``config.json`` asks for something absurd.

    Raises:
        ParedError: names the file or the key, what was found and what was expected.
    """
    path = folder / "config.json"
    status = path.stat()
    _require_sane_config(path, name, status.st_mtime_ns, status.st_size)


@lru_cache(maxsize=64)
def _require_sane_config(path: Path, name: str, *_: int) -> None:
    try:
        fields = read_json(path, "file", unique=False)
    except ParedError as error:
        raise ParedError(f"model {name!r}: no readable config.json ({error})") from None
    if not isinstance(fields, dict):
        raise ParedError(f"model {name!r}: config.json holds {brief(fields)}, expected an object")
    listed = fields.get("architectures")
    if listed is not None and not (
        isinstance(listed, list) and len(listed) <= MOST_ARCHITECTURES and all(isinstance(one, str) for one in listed)
    ):
        raise ParedError(f"model {name!r}: config.json: architectures is {brief(listed)}, expected names of classes")
    stored = fields.get("quantization_config")
    if stored is not None and not isinstance(stored, dict):
        raise ParedError(f"model {name!r}: config.json: quantization_config is {brief(stored)}, expected an object")
    if isinstance(stored, dict) and stored.get("quant_method") == "pared":
        fields = {key: value for key, value in fields.items() if key != "quantization_config"}  # has a schema
    for key, value in _numbers(fields):
        most = MOST_PARTS if PARTS.search(key.rpartition(".")[2]) else LARGEST_NUMBER
        if abs(value) > most:
            raise ParedError(f"model {name!r}: config.json: {key} is {brief(value)}, expected {most:,} at most")


def _numbers(value: Any, key: str = "") -> Any:
    """Yield every whole number of plain data with its dotted key."""
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from _numbers(inner, f"{key}.{name}" if key else name)
    elif isinstance(value, list):
        for inner in value:
            yield from _numbers(inner, key)
    elif isinstance(value, int) and not isinstance(value, bool):
        yield key, value


def without_quantization(config: "PretrainedConfig") -> "PretrainedConfig":
    """Return a configuration that says nothing of how weights are stored."""
    plain = copy.deepcopy(config)
    if hasattr(plain, "quantization_config"):
        del plain.quantization_config
    return plain


def require_files_for(skeleton: "nn.Module", entries: dict[str, dict[str, Any]], folder: Path, name: str) -> None:
    """Refuse to make room for numbers that the files cannot hold.

    Args:
        skeleton: the dense model without memory.
        entries: the map of changed modules.
        folder: with the files.
        name: of the model, for messages.

    Raises:
        ParedError: the configuration is of a far larger model.
    """
    stored = sum(entry.stat().st_size for entry in os.scandir(folder) if entry.name.endswith(WEIGHTS))
    needed = sum(one.numel() for one in (*skeleton.parameters(), *skeleton.buffers()))
    for entry in entries.values():
        if entry.get("kind") == "quantized":  # as many numbers as the dense weight, of fewer bits
            continue
        width, out = entry["in_features"], entry["out_features"]
        needed += entry.get("stored", entry.get("rank", 0) * (width + out)) - width * out
    if needed > max(NUMBERS_UNASKED, NUMBERS_A_BYTE * stored):
        raise DamagedError(
            f"model {name!r}: config.json describes {needed:,} parameters; the {stored:,} bytes of its files cannot "
            "hold them",
            "fetch it again",
        )


def require_floating(folder: Path, name: str) -> None:
    """Refuse weights stored as whole numbers where they are to be floating point: they would be taken as they are.

    Reads the headers of the files alone; what is unreadable is reported where the weights are read.

    Raises:
        ParedError: names the tensor and the file.
    """
    from safetensors import SafetensorError, safe_open

    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, framework="pt") as tensors:
                for tensor in tensors.keys():  # noqa: SIM118 - not a mapping
                    kind = str(tensors.get_slice(tensor).get_dtype())
                    if tensor.endswith((".weight", ".bias", ".values", ".scales")) and "F" not in kind:
                        raise DamagedError(
                            f"model {name!r}: {tensor} of {file.name} is stored as {kind}, expected floating point",
                            "fetch it again",
                        )
        except (SafetensorError, OSError):
            continue
