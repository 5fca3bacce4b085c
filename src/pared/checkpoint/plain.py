"""Models of uniform widths as plain ones of their own architecture: which sizes their configuration has to say."""

import copy
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from pared.checkpoint.portable import module_map, own_class
from pared.modules import replace_module
from pared.modules.narrow import forget_counts

NARROW = ("narrow", "narrow_conv1d")


def plain_sizes(model: PreTrainedModel) -> dict[str, int]:
    """Return the fields of a configuration that make the architecture have exactly the shapes of a narrow model.

    A field is tried, not known by its name: one that holds the dense width, or nothing (GPT-2's ``n_inner``), gets the
    width that is left, and the architecture is built without weights.

    Args:
        model: some of whose layers lost channels; its blocks may be on the meta device.

    Returns:
        Values by field of the text configuration; empty where anything else was changed, where widths differ, or where
        no field does it.
    """
    entries = module_map(model)
    if not entries or any(entry["kind"] not in NARROW for entry in entries.values()):
        return {}
    dense = _skeleton(model, model.config)
    # Code of the model's own comes along with the loader alone.
    if dense is None or not own_class(type(model)).__module__.startswith("transformers."):
        return {}
    changed = {pair for name, entry in entries.items() for pair in _changed(dense, name, entry)}
    if len(changed) != 1:
        return {}
    ((before, now),) = changed
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    for field, value in model.config.get_text_config().to_dict().items():
        if value is None or (type(value) is int and value == before):
            narrow = _skeleton(model, with_sizes(model.config, {field: now}))
            if narrow is not None and {n: tuple(p.shape) for n, p in narrow.named_parameters()} == shapes:
                return {field: now}
    return {}


def with_sizes(config: PretrainedConfig, sizes: dict[str, int]) -> PretrainedConfig:
    """Return a copy of a configuration with other sizes of the text model."""
    config = copy.deepcopy(config)
    set_sizes(config, sizes)
    return config


def set_sizes(config: PretrainedConfig, sizes: dict[str, int]) -> None:
    """Give a configuration other sizes of the text model, in place."""
    text = config.get_text_config()
    for field, value in sizes.items():
        setattr(text, field, value)


def _skeleton(model: PreTrainedModel, config: PretrainedConfig) -> nn.Module | None:
    """Return the architecture of a configuration on the meta device, None where that makes none."""
    try:
        with torch.device("meta"):
            built: nn.Module = own_class(type(model))._from_config(config, dtype=model.dtype)  # type: ignore[attr-defined]
    except Exception:  # whatever a size that means something else leads to
        return None
    return built


def _changed(dense: nn.Module, name: str, entry: dict[str, Any]) -> set[tuple[int, int]]:
    """Return the widths of a layer before and now, of the side that lost channels."""
    weight: Any = dense.get_submodule(name).weight
    out, width = weight.shape if entry["kind"] == "narrow" else weight.shape[::-1]
    sides = {(int(width), entry["in_features"]), (int(out) // entry["parts"], entry["out_features"] // entry["parts"])}
    return {(before, now) for before, now in sides if before != now}


def make_plain(model: PreTrainedModel) -> None:
    """Put a linear layer of the architecture's own class in the place of every narrow one; parameters stay theirs."""
    for name in module_map(model):
        old = model.get_submodule(name)
        base = nn.Linear if isinstance(old, nn.Linear) else Conv1D
        new: nn.Module = base.__new__(base)
        vars(new).update({key: value for key, value in vars(old).items() if key != "parts"})
        replace_module(model, name, new)
    forget_counts(model)
