"""What lies in a model's folder, read without loading any of it, and without torch, which may be what is broken."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from pared.errors import ParedError
from pared.io.files import path_of
from pared.io.guarded import MOST_BYTES, read_json, require_regular_files
from pared.io.record import MANIFEST

CONFIG, INDEX, WEIGHTS = "config.json", "model.safetensors.index.json", "model.safetensors"


class Header(NamedTuple):
    """A tensor as the header of its file has it.

    Attributes:
        file: name of the file.
        dtype: as safetensors calls it, ``BF16``.
        shape: of it.
    """

    file: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Stored:
    """A folder as it lies on the disk.

    Attributes:
        path: of it.
        config: what its ``config.json`` says; empty where that cannot be read.
        manifest: what its ``pared.json`` says; empty where there is none, or it cannot be read.
        tensors: of its safetensors files, by name.
        unreadable: what could not be read, and why.
    """

    path: Path
    config: Mapping[str, Any]
    manifest: Mapping[str, Any]
    tensors: Mapping[str, Header]
    unreadable: tuple[str, ...] = ()
    index: Mapping[str, str] = field(default_factory=dict)

    @property
    def quantization(self) -> Mapping[str, Any]:
        """The slot ``quantization_config`` of the configuration, empty where there is none."""
        found = self.config.get("quantization_config")
        return found if isinstance(found, dict) else {}

    @property
    def is_ours(self) -> bool:
        """Whether the slot holds a map of pared."""
        return self.quantization.get("quant_method") == "pared"

    @classmethod
    def read(cls, folder: str | Path) -> "Stored":
        """Read a folder's configuration, manifest and the headers of its weights.

        Raises:
            ParedError: there is no such folder, or it holds what is no file.
        """
        path = path_of(folder)
        if not path.is_dir():
            what = "a file, expected the folder of a model" if path.is_file() else "no such folder"
            raise ParedError(f"{folder}: {what}")
        require_regular_files(path)
        unreadable: list[str] = []
        config, manifest = _fields(path / CONFIG, unreadable), _fields(path / MANIFEST, unreadable)
        index = _fields(path / INDEX, unreadable).get("weight_map", {})
        if not (path / CONFIG).exists():
            unreadable.append(f"{CONFIG} is missing: this is no model")
        tensors: dict[str, Header] = {}
        for file in sorted(path.glob("*.safetensors")):
            try:
                tensors |= headers_of(file)
            except (OSError, ValueError, KeyError, TypeError) as error:
                unreadable.append(f"{file.name} is damaged or truncated ({error})")
        return cls(path, config, manifest, tensors, tuple(unreadable), index if isinstance(index, dict) else {})


def headers_of(file: Path) -> dict[str, Header]:
    """Return the tensors of a safetensors file by name, from its header.

    Raises:
        ValueError: it is none, or is shorter than its header says.
    """
    size = file.stat().st_size
    with file.open("rb") as raw:
        length = int.from_bytes(raw.read(8), "little")
        if not 0 < length <= min(size - 8, MOST_BYTES):
            raise ValueError(f"a header of {length:,} bytes in a file of {size:,}")
        header: dict[str, Any] = json.loads(raw.read(length))
    header.pop("__metadata__", None)
    ends = max((int(one["data_offsets"][1]) for one in header.values()), default=0)
    if 8 + length + ends != size:
        raise ValueError(f"{size:,} bytes, and its header says {8 + length + ends:,}")
    return {name: Header(file.name, str(one["dtype"]), tuple(one["shape"])) for name, one in header.items()}


def _fields(path: Path, unreadable: list[str]) -> dict[str, Any]:
    """Return the object that a file holds, empty where there is none; note what cannot be read."""
    if not path.exists():
        return {}
    try:
        found = read_json(path, "file", unique=False)
    except ParedError as error:
        unreadable.append(str(error))
        return {}
    if not isinstance(found, dict):
        unreadable.append(f"{path.name} holds no object")
    return found if isinstance(found, dict) else {}
