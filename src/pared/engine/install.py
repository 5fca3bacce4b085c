"""Putting what a method found in the place of the layers it was found for, and what must hold before."""

import torch
from torch import nn
from transformers import PreTrainedModel

from pared.anatomy import Anatomy, bias_of, weight_of
from pared.errors import ParedError
from pared.lowrank import Factors
from pared.modules import LowRankLinear, replace_module


@torch.no_grad()
def install(model: nn.Module, name: str, factors: Factors) -> None:
    """Put a ``LowRankLinear`` of these factors where a linear layer stands, with its bias, dtype and device."""
    old = model.get_submodule(name)
    weight, bias = weight_of(old), bias_of(old)
    out_features, in_features = weight.shape
    rank = factors.down.shape[0]
    new = LowRankLinear(in_features, out_features, rank, bias is not None, device=weight.device, dtype=weight.dtype)
    new.down.weight.copy_(factors.down)
    new.up.weight.copy_(factors.up)
    if bias is not None:
        new.up.bias.copy_(bias)
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
