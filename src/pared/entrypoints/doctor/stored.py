"""What lies in a model's folder, read without loading any of it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from pared.errors import DamagedError, ParedError
from pared.io.files import path_of
from pared.io.guarded import read_json, require_regular_files
from pared.io.record import MANIFEST
from pared.models.stored import stored_tensors

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
                found = stored_tensors([file], path.name)
            except DamagedError as error:
                unreadable.append(f"{file.name} is damaged or truncated ({error.what})")
                continue
            tensors |= {name: Header(file.name, one.dtype, one.shape) for name, one in found.items()}
        return cls(path, config, manifest, tensors, tuple(unreadable), index if isinstance(index, dict) else {})


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
