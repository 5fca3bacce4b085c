"""Architectures of other sizes: which fields of a configuration say so, tried on models without weights."""

import copy
from collections.abc import Iterator, Mapping
from itertools import combinations
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

Sizes = dict[str, int]  # of a configuration, by field


def set_sizes(config: PretrainedConfig, sizes: Sizes) -> None:
    """Give a configuration other sizes of the text model, in place."""
    text = config.get_text_config()
    for field, value in sizes.items():
        setattr(text, field, value)


def resized(model: PreTrainedModel, sizes: Sizes, kind: Any = None) -> nn.Module | None:
    """Return the architecture on the meta device with other sizes of the text model, None where that makes none.

    Args:
        model: whose configuration and dtype are read.
        sizes: of it.
        kind: the class, where it is not the model's own.
    """
    config = copy.deepcopy(model.config)
    try:
        set_sizes(config, sizes)
        text = config.get_text_config()
        if hasattr(text, "validate"):  # what a folder with this configuration is read by
            text.validate()
        with torch.device("meta"):
            built: nn.Module = (kind or type(model))._from_config(config, dtype=model.dtype)
    except Exception:  # whatever a size that means something else leads to
        return None
    return built


def sizes_with_fewer(model: PreTrainedModel, shorter: Mapping[str, int]) -> Sizes | None:
    """Return the fields of a configuration that make some tensors shorter and leave all else as it is.

    Fields are tried, not known by their names: those that hold the length that the tensors have now.

    Args:
        model: may be on the meta device.
        shorter: the first dimension that each of these parameters and buffers is to have, by full name; one number.
    """
    before = {name: tuple(one.shape) for name, one in _tensors(model)}
    lengths, (length,) = {before[name][0] for name in shorter}, set(shorter.values())
    expected = {name: (length, *shape[1:]) if name in shorter else shape for name, shape in before.items()}
    # Code of the model's own reads what it likes.
    if len(lengths) != 1 or not type(model).__module__.startswith("transformers."):
        return None
    fields = model.config.get_text_config().to_dict()
    held = [name for name, value in fields.items() if type(value) is int and value in lengths]
    for size in range(1, len(held) + 1):
        for names in combinations(held, size):
            sizes = dict.fromkeys(names, length)
            built = resized(model, sizes)
            if built is not None and {name: tuple(one.shape) for name, one in _tensors(built)} == expected:
                return sizes
    return None


def take_numbers(model: PreTrainedModel, before: int, now: int) -> None:
    """Have every module of a model hold one number in place of another where its configuration says so, in place.

    Args:
        model: whose configuration has its new sizes.
        before: the number that attributes hold.
        now: the number that they hold in the architecture of that configuration.
    """
    built = resized(model, {})
    assert built is not None, "its sizes were tried"
    news = dict(built.named_modules())
    for name, module in model.named_modules():
        own, new = vars(module), vars(news[name]) if name in news else {}
        for attribute, value in own.items():
            if type(value) is int and value == before and new.get(attribute) == now:
                own[attribute] = now


def _tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()
