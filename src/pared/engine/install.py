"""Putting what a method found in the place of the layers it was found for, and what must hold before."""

import torch
from torch import nn
from transformers import PreTrainedModel

from pared.anatomy import Anatomy, bias_of, weight_of
from pared.errors import ParedError
from pared.lowrank import Factors
from pared.lowrank.pivot import pivot
from pared.modules import LowRankLinear, PivotedLinear, replace_module


@torch.no_grad()
def install(model: nn.Module, name: str, factors: Factors, pivoted: bool = False) -> None:
    """Put these factors where a linear layer stands, with its bias, dtype and device.

    Args:
        model: the whole model.
        name: of the linear layer.
        factors: what takes its place.
        pivoted: as a ``PivotedLinear``, ``rank²`` parameters fewer, rather than a ``LowRankLinear``.
    """
    old = model.get_submodule(name)
    weight, bias = weight_of(old), bias_of(old)
    out_features, in_features = weight.shape
    rank = factors.down.shape[0]
    shape = (in_features, out_features, rank, bias is not None, weight.device, weight.dtype)
    new: LowRankLinear | PivotedLinear
    if pivoted:
        new, stored = PivotedLinear(*shape), pivot(factors)
        new.set_weight(stored.pivots_K, stored.W_KN, stored.C_RK)
    else:
        new = LowRankLinear(*shape)
        new.down.weight.copy_(factors.down)
        new.up.weight.copy_(factors.up)
    if bias is not None and new.bias is not None:
        new.bias.copy_(bias)
    replace_module(model, name, new)


def require_finite_weights(model: PreTrainedModel, anatomy: Anatomy) -> None:
    """Refuse a model whose sites hold anything but finite floating point numbers in memory.

    Raises:
        ParedError: names the site.
    """
    for site in anatomy.sites:
        weight = weight_of(model.get_submodule(site.name))
        if weight.is_meta:
            raise ParedError(f"site {site.name} is on the meta device (offloaded); load the model without offloading")
        if not weight.is_floating_point():
            raise ParedError(f"site {site.name} holds {weight.dtype}; pared needs floating point weights")
        if not bool(weight.isfinite().all()):
            raise ParedError(f"site {site.name} has NaN or infinity in its weight; the checkpoint is damaged")
