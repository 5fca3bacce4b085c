"""Experts of a mixture become targets: which are opened for a compression, and how a model is left afterwards."""

import copy
import fnmatch
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import nn
from transformers import PreTrainedModel

from pared.engine.spec import CompressionSpec, ExpertSpec, LowRankSpec
from pared.modules import Changed
from pared.modules.opened import close, opened_experts, put_back
from pared.schema.recipe import Recipe
from pared.structure.model import find_blocks_path
from pared.structure.opening import Openable, open_experts, openable


def experts_to_open(model: nn.Module, spec: CompressionSpec) -> list[Openable]:
    """Return the mixtures whose experts a compression has as targets, in the model's order.

    Those all of whose layers the recipe skips stay as they are. All do where whole experts are taken out, where the
    folder is to be a plain one of the architecture, and where examples are told apart that an expert reads mixed.

    Args:
        model: loaded, or on the meta device; it is not changed.
        spec: of the compression.

    Raises:
        ParedError: there are no blocks.
    """
    if isinstance(spec, ExpertSpec) or (isinstance(spec, LowRankSpec) and (_is_plain(spec) or _tells_apart(spec))):
        return []
    found = openable_of(model, spec.recipe)
    return [one for one in found if not all(_is_skipped(name, spec.recipe.skip) for name in one.sites)]


def openable_of(model: nn.Module, recipe: Recipe) -> list[Openable]:
    """Return all mixtures of the blocks that a recipe names whose experts can be opened, and are not."""
    path = find_blocks_path(model, recipe.blocks)
    blocks = model.get_submodule(path)
    return openable([block for block in blocks._modules.values() if block is not None], path)


def opened_shapes(model: PreTrainedModel, spec: CompressionSpec) -> PreTrainedModel:
    """Return a model whose experts are open if a compression opens them: the model itself, or its shapes alone.

    Args:
        model: loaded, or on the meta device; it is not changed.
        spec: of the compression.
    """
    if not (found := experts_to_open(model, spec)):
        return model
    shapes = shapes_of(model)
    open_experts(shapes, found)
    return shapes


def shapes_of(model: PreTrainedModel) -> PreTrainedModel:
    """Return a copy of a model on the meta device; nothing of its numbers is copied."""
    tensors: Mapping[int, torch.Tensor] = {
        **{id(one): nn.Parameter(one.detach().to("meta"), one.requires_grad) for one in model.parameters()},
        **{id(one): one.to("meta") for one in model.buffers()},
    }
    return copy.deepcopy(model, dict(tensors))


@contextmanager
def experts_opened(model: nn.Module, spec: CompressionSpec) -> Iterator[None]:
    """Have the experts that a compression opens open for the length of a ``with`` block; no number is copied."""
    found = experts_to_open(model, spec)
    open_experts(model, found, views=True)
    try:
        yield
    finally:
        for one in found:
            put_back(model, one.name)


def close_unchanged(model: nn.Module) -> None:
    """Put mixtures back, in place, of which no layer was changed: their numbers may be others, as where trained."""
    for name, experts in opened_experts(model).items():
        if not any(isinstance(module, Changed) for module in experts.modules()):
            close(model, name)


def patterns_of(model: nn.Module, recipe: Recipe, sites: Sequence[str]) -> list[str]:
    """Return the patterns of what a recipe skips that are of layers which are there.

    Args:
        model: some of whose mixtures may be closed as all of their layers are skipped.
        recipe: that skips some.
        sites: names of the layers that are there.
    """
    if not recipe.skip:
        return []
    closed = [name for one in openable_of(model, recipe) for name in one.sites]
    return [one for one in recipe.skip if fnmatch.filter(sites, one) or not fnmatch.filter(closed, one)]


def _is_plain(spec: LowRankSpec) -> bool:
    """Whether all blocks get one width, which the architecture's own configuration can say."""
    return spec.structures == "widths" and spec.allocator.name == "uniform"


def _tells_apart(spec: LowRankSpec) -> bool:
    """Whether gradients are squared example by example, and several are in a batch."""
    return spec.recipe.calibration.batch != 1 and any(one.startswith("fisher") for one in spec.gradients)


def _is_skipped(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatch(name, pattern) for pattern in patterns)
