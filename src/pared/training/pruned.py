"""Which layers of a model are pruned, and where their zeros are, be they stored sparse or plain."""

import torch
from torch import nn

from pared.anatomy.linear import LINEAR_TYPES
from pared.modules import SparseLinear


def pruned_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Return the pruned layers of a model by name.

    That is every :class:`~pared.modules.SparseLinear`, and every plain linear layer with a weight that is exactly zero,
    as a dense export has them. No pruning leaves a whole layer zero, and none touches the head: an all-zero layer, the
    output embeddings and the matrices of adapters do not count.

    Args:
        model: a transformers model, or one that PEFT has wrapped.
    """
    adapters = _inside_adapters(model)
    head = getattr(model, "get_output_embeddings", lambda: None)()
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, LINEAR_TYPES) and id(module) not in adapters and module is not head and _is_pruned(module)
    }


def zeros_of(layer: nn.Module) -> torch.Tensor:
    """Return True where a pruned layer's weight stays zero, bool, of the shape the weight is stored in.

    In a sparse layer that is where nothing is stored, in a plain one where the weight is zero now.
    """
    if isinstance(layer, SparseLinear):
        return ~layer.mask
    assert isinstance(layer.weight, torch.Tensor)
    return layer.weight.detach() == 0


def _is_pruned(layer: nn.Module) -> bool:
    if isinstance(layer, SparseLinear):
        return True
    weight = layer.weight
    if not isinstance(weight, torch.Tensor) or weight.is_meta:
        return False
    return 0 < int(weight.detach().count_nonzero()) < weight.numel()


def _inside_adapters(model: nn.Module) -> set[int]:
    """Return the ids of modules that PEFT has put beside the layers they adapt."""
    return {
        id(part)
        for module in model.modules()
        if isinstance(base := getattr(module, "base_layer", None), nn.Module)
        for part in set(module.modules()) - set(base.modules())
    }
