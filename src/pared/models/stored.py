"""The files of a checkpoint: which tensors lie in which of them, and where.

Files are read, not mapped: pages of a mapped file would count as memory of the process for as long as it is open. But
a tensor lies where it would in a mapped one, up to multiples of a cache line: products of matrices differ in their last
bits by where those begin, and a model read here is to compute what one that ``from_pretrained`` maps does.
"""

import itertools
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, WEIGHTS_INDEX_NAME, WEIGHTS_NAME, cached_file

from pared.errors import DamagedError, ParedError
from pared.io.guarded import brief, read_json
from pared.models.source import QUIETLY
from pared.names import called

ADVICE = "fetch it again"
FORMS = ((SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME), (WEIGHTS_NAME, WEIGHTS_INDEX_NAME))
LINE = 64  # bytes of a cache line, the finest that kernels look at; what torch aligns its own tensors to
TORCH_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}


class StoredTensor(NamedTuple):
    """A tensor of a file.

    Attributes:
        file: that holds it.
        key: its name there.
        shape: of it.
        dtype: as safetensors calls it, ``BF16``.
        start: of its first byte in the file.
        place: in memory, modulo :data:`LINE`.
    """

    file: Path
    key: str
    shape: tuple[int, ...]
    dtype: str
    start: int
    place: int

    @property
    def is_floating(self) -> bool:
        """Whether it holds floating point numbers."""
        return "F" in self.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of it, as it is stored."""
        return torch.Size(self.shape).numel() * TORCH_DTYPES.get(self.dtype, torch.float64).itemsize


def weight_files(location: str, name: str) -> list[Path]:
    """Return the files that a model's weights lie in, one or as many as its index lists.

    Safetensors if there are any, else what ``torch.save`` wrote; as ``from_pretrained`` takes them.

    Args:
        location: a folder, or an id of the Hub.
        name: of the model, for messages.

    Raises:
        ParedError: there are none, the index cannot be read, or a file that it lists is not there.
    """
    for single, index in FORMS:
        try:
            if (file := cached_file(location, single, **QUIETLY)) is not None:
                return [Path(file)]
            file = cached_file(location, index, **QUIETLY)
        except (OSError, ValueError) as error:
            raise ParedError(f"model {name!r}: its weights cannot be found ({error})") from None
        if file is not None:
            return _listed(location, Path(file), name)
    raise ParedError(
        f"model {name!r}: there are no weights that can be read block by block, which are {SAFE_WEIGHTS_NAME} or "
        f"{WEIGHTS_NAME}, or the files of an index of either: make such a folder with pared export {name} --out DIR, "
        f"or work with the whole model in memory ({called('stream', 'off')})"
    )


def require_listed(folder: Path, name: str) -> None:
    """Refuse a folder whose index of weights cannot be read, or lists a file that is not there.

    Args:
        folder: of the model.
        name: of it, for messages.

    Raises:
        ParedError: it is one; names the file.
    """
    for single, index in FORMS:
        if (folder / single).exists():
            return
        if (folder / index).exists():
            _listed(str(folder), folder / index, name)
            return


def _listed(location: str, index: Path, name: str) -> list[Path]:
    listed = read_json(index, "index of the weights", unique=False)
    weight_map = listed.get("weight_map") if isinstance(listed, dict) else None
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise DamagedError(f"model {name!r}: {index} lists no files of weights", ADVICE)
    return [_shard(location, file, name) for file in sorted(set(weight_map.values()))]


def _shard(location: str, file: str, name: str) -> Path:
    if Path(file).name != file:
        raise DamagedError(f"model {name!r}: its index names {brief(file)}, expected a file beside it", ADVICE)
    try:
        found = cached_file(location, file, **QUIETLY)
    except (OSError, ValueError) as error:
        raise ParedError(f"model {name!r}: {file} cannot be fetched ({error})") from None
    if found is None:
        raise DamagedError(f"model {name!r}: {file}, which its index lists, is missing", ADVICE)
    return Path(found)


def stored_tensors(
    files: Iterable[Path], name: str, places: Mapping[str, int] | None = None
) -> dict[str, StoredTensor]:
    """Return the tensors of some files by their names there; only headers are read.

    Args:
        files: of safetensors, or that ``torch.save`` wrote.
        name: of the model, for messages.
        places: where in memory they lie, modulo :data:`LINE`, but for zeros; where a mapped file has them if not given.

    Raises:
        DamagedError: a file is missing, is truncated, or is not of its form.
        ParedError: a file that ``torch.save`` wrote is of a form that cannot be read tensor by tensor.
    """
    found: dict[str, StoredTensor] = {}
    for file in files:
        if not is_safetensors(file):
            found |= _pickled(file, name)
            continue
        with opened(file, name) as tensors:  # checks the header too
            starts = _starts(file)
            for key in tensors.keys():  # noqa: SIM118 - not a mapping
                part = tensors.get_slice(key)
                place = starts[key] % LINE if places is None else places.get(key, 0)
                found[key] = StoredTensor(file, key, tuple(part.get_shape()), str(part.get_dtype()), starts[key], place)
    return found


def _starts(file: Path) -> dict[str, int]:
    """Return where in a file its tensors begin."""
    with file.open("rb") as raw:
        size = int.from_bytes(raw.read(8), "little")
        header = json.loads(raw.read(size))
    return {key: 8 + size + entry["data_offsets"][0] for key, entry in header.items() if key != "__metadata__"}


def is_safetensors(file: Path) -> bool:
    """Whether a file is one of safetensors, by its name; ``torch.save`` wrote it otherwise."""
    return file.suffix == ".safetensors"


def _pickled(file: Path, name: str) -> dict[str, StoredTensor]:
    """Return the tensors of a file that ``torch.save`` wrote; nothing but their list is read, and no code is run."""
    from torch._subclasses.fake_tensor import FakeTensorMode  # imports a compiler

    with opened(file, name):
        try:
            with FakeTensorMode():  # tensors without memory, which know where in the file their numbers begin
                listed = torch.load(file, weights_only=True)
        except Exception as error:  # zipfile, pickle and torch each raise their own
            raise OSError(f"{type(error).__name__}: {str(error).strip()[:200]}") from None
    if not isinstance(listed, dict):
        raise DamagedError(f"model {name!r}: {file} holds {type(listed).__name__}, expected tensors by name", ADVICE)
    found = {}
    for key, tensor in listed.items():
        if not isinstance(tensor, torch.Tensor):
            continue
        start = getattr(tensor.untyped_storage(), "_checkpoint_offset", None)
        if start is None or not tensor.is_contiguous() or tensor.dtype not in DTYPE_NAMES:
            why = "is in the form of torch before 1.6" if start is None else f"has {key} in an order of its own"
            raise ParedError(
                f"model {name!r}: {file.name} {why}, which cannot be read block by block: write it anew with pared "
                f"export {name} --out DIR, or work with the whole model in memory ({called('stream', 'off')})"
            )
        start += tensor.storage_offset() * tensor.itemsize
        dtype, shape = DTYPE_NAMES[tensor.dtype], tuple(tensor.shape)
        found[str(key)] = StoredTensor(file, str(key), shape, dtype, start, start % LINE)
    return found


@contextmanager
def opened(file: Path, name: str) -> Iterator[Any]:
    """Open a file of tensors for the length of a ``with`` block; what goes wrong inside is reported as its damage.

    Gives its slices, None for what ``torch.save`` wrote.

    Raises:
        DamagedError: it is missing or truncated, or a tensor in it cannot be read.
    """
    try:
        if not is_safetensors(file):
            yield None
            return
        with safe_open(file, framework="pt", backend="pread") as tensors:
            yield tensors
    except (SafetensorError, OSError, EOFError) as error:
        raise DamagedError(f"model {name!r}: {file} is missing, unreadable or truncated ({error})", ADVICE) from None


def read_stored(stored: StoredTensor, name: str) -> torch.Tensor:
    """Return one tensor as it is stored.

    Args:
        stored: where it lies.
        name: of the model, for messages.

    Raises:
        DamagedError: its file cannot be read.
    """
    with opened(stored.file, name), stored.file.open("rb", buffering=0) as raw:
        return read_at(raw, stored)


def read_at(raw: FileIO, stored: StoredTensor) -> torch.Tensor:
    """Return one tensor of an open file, at its place in a cache line."""
    dtype, size = TORCH_DTYPES[stored.dtype], torch.Size(stored.shape).numel()
    room = torch.empty(size * dtype.itemsize + LINE, dtype=torch.uint8)
    shift = (stored.place - room.data_ptr()) % LINE
    bytes_ = room[shift : shift + size * dtype.itemsize]
    left = bytes_.numpy().data
    raw.seek(stored.start)
    while left:
        count = raw.readinto(left)
        if not count:
            raise EOFError(f"{stored.key} ends too early")
        left = left[count:]
    return bytes_.view(dtype).view(stored.shape)


def read_ahead(tensors: Iterable[StoredTensor]) -> None:
    """Have the system read tensors into its cache while this process computes, where it can; nothing is waited for."""
    if not hasattr(os, "posix_fadvise"):
        return
    for file, own in itertools.groupby(sorted(tensors, key=lambda one: (one.file, one.start)), lambda one: one.file):
        with suppress(OSError), file.open("rb", buffering=0) as raw:  # what is wrong with it is told when it is read
            for one in own:
                os.posix_fadvise(raw.fileno(), one.start, one.nbytes, os.POSIX_FADV_WILLNEED)


def first_floating(tensors: Iterable[StoredTensor]) -> torch.dtype:
    """Return the dtype of the first tensor of floating point numbers, what a configuration without one is read as."""
    found = (TORCH_DTYPES[one.dtype] for one in tensors if one.is_floating and one.dtype in TORCH_DTYPES)
    return next(found, torch.float32)


def metadata_of(file: Path, name: str) -> dict[str, Any]:
    """Return what pared wrote into a file besides its tensors.

    Raises:
        DamagedError: the file cannot be read, or holds nothing of the kind.
    """
    with opened(file, name) as tensors:
        text = (tensors.metadata() or {}).get("pared", "")
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise DamagedError(f"{file} was not written by pared for a block of a model", "remove it and start again")
    return found
