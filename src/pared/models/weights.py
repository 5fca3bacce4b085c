"""Where transformers puts the tensors of a checkpoint in a model."""

import logging as python_logging
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
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
from transformers.utils import logging

from pared.errors import DamagedError
from pared.models.stored import ADVICE, TORCH_DTYPES, StoredTensor, opened, read_at, read_stored

log = python_logging.getLogger(__name__)


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
            files = {file: stack.enter_context(opened(file, self._name)) for file in {one.file for one in tensors}}
            raw = {file: stack.enter_context(file.open("rb", buffering=0)) for file in files}
            merged: dict[str, Any] = {}
            for one in tensors:
                if placed[one.key].converted:
                    tensors_there = files[one.file]
                    lazily = tensors_there is not None
                    merged[one.key] = tensors_there.get_slice(one.key) if lazily else read_at(raw[one.file], one)
                else:
                    self.put(placed[one.key].names[0], read_at(raw[one.file], one), one)
            if merged:
                self._convert(merged)

    def read(self, stored: StoredTensor) -> torch.Tensor:
        """Return one tensor as it is stored.

        Raises:
            DamagedError: its file cannot be read.
        """
        return read_stored(stored, self._name)

    @torch.no_grad()
    def converted(self, tensors: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        """Return what tensors of a checkpoint become in the model, by the names there; the model stays without values.

        Args:
            tensors: as they are stored, or what gives them when it is indexed, by their names in the checkpoint.

        Raises:
            DamagedError: they cannot be put together.
        """
        empty = [(module, dict(module._parameters), dict(module._buffers)) for module in self._model.modules()]
        before = {name: id(tensor) for name, tensor in self._model.state_dict(keep_vars=True).items()}
        try:
            self._convert(tensors)
            after = self._model.state_dict(keep_vars=True).items()
            return {name: tensor.detach() for name, tensor in after if before.get(name) != id(tensor)}
        finally:
            for module, parameters, buffers in empty:
                module._parameters.update(parameters)
                module._buffers.update(buffers)

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
