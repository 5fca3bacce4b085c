"""The tensors of a checkpoint one by one: in which file each lies, and where transformers puts it in a model.

Files are read, not mapped: pages of a mapped file would count as memory of the process for as long as it is open. But
a tensor lies where it would in a mapped one, up to multiples of a cache line: products of matrices differ in their last
bits by where those begin, and a model read here is to compute what one that ``from_pretrained`` maps does.
"""

import json
import logging as python_logging
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from io import FileIO
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    convert_and_load_state_dict_in_model,
    dot_natural_key,
    rename_source_key,
)
from transformers.modeling_utils import LoadStateDictConfig
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file, logging

from pared.errors import DamagedError, ParedError
from pared.io.guarded import brief, read_json
from pared.models.source import QUIETLY
from pared.names import called

log = python_logging.getLogger(__name__)

ADVICE = "fetch it again"
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

    Args:
        location: a folder, or an id of the Hub.
        name: of the model, for messages.

    Raises:
        ParedError: there are none in safetensors, the index cannot be read, or a file that it lists is not there.
    """
    try:
        if (single := cached_file(location, SAFE_WEIGHTS_NAME, **QUIETLY)) is not None:
            return [Path(single)]
        index = cached_file(location, SAFE_WEIGHTS_INDEX_NAME, **QUIETLY)
    except (OSError, ValueError) as error:
        raise ParedError(f"model {name!r}: its weights cannot be found ({error})") from None
    if index is None:
        raise ParedError(
            f"model {name!r}: neither {SAFE_WEIGHTS_NAME} nor {SAFE_WEIGHTS_INDEX_NAME} is there; only safetensors can "
            "be read block by block: convert it, or work with the whole model in memory "
            f"({called('stream', 'off')})"
        )
    listed = read_json(Path(index), "index of the weights", unique=False)
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
        files: of safetensors.
        name: of the model, for messages.
        places: where in memory they lie, modulo :data:`LINE`, but for zeros; where a mapped file has them if not given.

    Raises:
        DamagedError: a file is missing, is truncated, or is not safetensors.
    """
    found: dict[str, StoredTensor] = {}
    for file in files:
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


@contextmanager
def opened(file: Path, name: str) -> Iterator[Any]:
    """Open a file of tensors for the length of a ``with`` block; what goes wrong inside is reported as its damage.

    Raises:
        DamagedError: it is missing or truncated, or a tensor in it cannot be read.
    """
    try:
        with safe_open(file, framework="pt", backend="pread") as tensors:
            yield tensors
    except (SafetensorError, OSError, EOFError) as error:
        raise DamagedError(f"model {name!r}: {file} is missing, unreadable or truncated ({error})", ADVICE) from None


def _read(raw: FileIO, stored: StoredTensor) -> torch.Tensor:
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


class Placed(NamedTuple):
    """Where a tensor of a checkpoint goes.

    Attributes:
        names: of the parameters and buffers it becomes; several where one stored tensor is taken apart.
        converted: whether it is more than renamed: merged with others, split or permuted.
    """

    names: tuple[str, ...]
    converted: bool


class WeightNames:
    """How transformers maps the names in a checkpoint to those of a model, and fills the model from it.

    Args:
        model: without values, as the architecture builds it; its modules those of the checkpoint.
        dtype: it is loaded in.
        quantizer: that put modules of the checkpoint in place, if any.
        name: of the model, for messages.
    """

    def __init__(self, model: PreTrainedModel, dtype: torch.dtype, quantizer: Any, name: str) -> None:
        self._model, self._dtype, self._quantizer, self._name = model, dtype, quantizer, name
        self._mapping = get_model_conversion_mapping(model, None, quantizer)
        self._renamings = [one for one in self._mapping if isinstance(one, WeightRenaming)]
        self._converters = [one for one in self._mapping if isinstance(one, WeightConverter)]
        self._by_pattern = {pattern: one for one in self._converters for pattern in one.source_patterns}
        self._plan: dict[str, torch.dtype] = model._get_dtype_plan(dtype)

    def placed(self, keys: Iterable[str]) -> dict[str, Placed]:
        """Return where the tensors of these names go; names of no parameter or buffer where they have no place."""
        known = self._model.state_dict()
        found = {key: self._placed(key, known) for key in sorted(keys, key=dot_natural_key)}
        # What save_pretrained goes by to give tensors the names they came with.
        self._model._weight_conversions = [one for one in self._mapping if one.was_used()]
        return found

    def _placed(self, key: str, known: dict[str, torch.Tensor]) -> Placed:
        prefix = self._model.base_model_prefix
        renamed, pattern = rename_source_key(key, self._renamings, self._converters, prefix, known)
        if renamed not in known and key in known:
            renamed, pattern = rename_source_key(key, [], [], prefix, known)
        if pattern is None:
            return Placed((renamed,), False)
        targets = self._by_pattern[pattern].target_patterns
        return Placed(tuple(renamed.replace(targets[0], target) for target in targets), True)

    @torch.no_grad()
    def fill(self, tensors: Sequence[StoredTensor], placed: Mapping[str, Placed]) -> None:
        """Read tensors and put them in the model, with the dtypes that ``from_pretrained`` gives them.

        Raises:
            DamagedError: a file cannot be read, or a tensor has another shape than its place.
        """
        with ExitStack() as stack:
            files = {one.file: stack.enter_context(opened(one.file, self._name)) for one in tensors}
            raw = {file: stack.enter_context(file.open("rb", buffering=0)) for file in files}
            merged: dict[str, Any] = {}
            for one in tensors:
                if placed[one.key].converted:
                    merged[one.key] = files[one.file].get_slice(one.key)
                else:
                    self.put(placed[one.key].names[0], _read(raw[one.file], one), one)
            if merged:
                self._convert(merged)

    def read(self, stored: StoredTensor) -> torch.Tensor:
        """Return one tensor as it is stored.

        Raises:
            DamagedError: its file cannot be read.
        """
        with opened(stored.file, self._name), stored.file.open("rb", buffering=0) as raw:
            return _read(raw, stored)

    def missing(self, placed: Mapping[str, Placed]) -> set[str]:
        """Return the names of parameters and buffers that a checkpoint has nothing for, but should."""
        present = {name for one in placed.values() for name in one.names}
        ignored = self._model._keys_to_ignore_on_load_missing or ()
        return {
            name
            for name in self._model.state_dict()
            if name not in present
            and not name.endswith("_extra_state")
            and not any(re.search(pattern, name) for pattern in ignored)
        }

    def put(self, name: str, values: torch.Tensor, stored: StoredTensor) -> None:
        """Put values in the place of a parameter or buffer.

        Raises:
            DamagedError: they have another shape.
        """
        path, _, leaf = name.rpartition(".")
        module: nn.Module = self._model.get_submodule(path)
        before = module._parameters.get(leaf) if leaf in module._parameters else module._buffers.get(leaf)
        if before is None or before.shape != values.shape:
            shape = None if before is None else tuple(before.shape)
            raise DamagedError(
                f"model {self._name!r}: {stored.key} of {stored.file.name} is {tuple(values.shape)}, the model's "
                f"{name} is {shape}",
                ADVICE,
            )
        values = values.to(self.dtype_of(name, before, stored))
        if leaf in module._parameters:
            trained = before.requires_grad and values.is_floating_point()
            module._parameters[leaf] = nn.Parameter(values, requires_grad=trained)
        else:
            module._buffers[leaf] = values

    def dtype_of(self, name: str, before: torch.Tensor, stored: StoredTensor) -> torch.dtype:
        """Return the dtype that ``from_pretrained`` gives a stored tensor in the place of another."""
        if self._quantizer is not None and not stored.is_floating:
            return TORCH_DTYPES[stored.dtype]  # packed bits and orders are taken as they are
        for pattern, dtype in self._plan.items():
            if re.search(pattern.replace("*", ".*"), name):
                return dtype
        return before.dtype

    def _convert(self, merged: Mapping[str, Any]) -> None:
        """Have transformers merge, split or permute tensors on their way into the model."""
        config = LoadStateDictConfig(
            dtype=self._dtype, dtype_plan=self._plan, hf_quantizer=self._quantizer, weight_mapping=self._mapping
        )
        with _no_progress_bar():
            info, _ = convert_and_load_state_dict_in_model(self._model, dict(merged), config)
        if faults := [*info.conversion_errors.values(), *map(str, info.mismatched_keys), *info.error_msgs]:
            text = " ".join(faults[0].split())[-300:]
            raise DamagedError(f"model {self._name!r}: weights cannot be put together ({text})", ADVICE)


def require_none_missing(missing: Iterable[str], name: str) -> None:
    """Refuse a checkpoint that lacks weights of its model.

    Raises:
        DamagedError: it lacks some; names the first.
    """
    if lacking := sorted(missing):
        raise DamagedError(
            f"model {name!r}: {len(lacking)} weights are missing from the checkpoint, the first is {lacking[0]!r}; "
            "transformers would fill them with random numbers",
            ADVICE,
        )


def warn_of_unused(unused: Iterable[str], name: str) -> None:
    """Say which tensors of a checkpoint have no place in any block of the model."""
    if left := sorted(key for key in unused if re.search(r"\.\d+\.", key)):
        log.warning(
            "model %s: %d weights of the checkpoint have no place in the model, the first is %s",
            name,
            len(left),
            left[0],
        )


@contextmanager
def _no_progress_bar() -> Iterator[None]:
    """Keep transformers from drawing a bar for every block."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


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
