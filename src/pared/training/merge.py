"""Merging adapters into pruned weights."""

from typing import TYPE_CHECKING, cast

import torch
from torch import nn
from transformers import PreTrainedModel

from pared.errors import ParedError
from pared.modules.packing import pack_mask, unpack_mask
from pared.training.pruned import pruned_layers, zeros_of

if TYPE_CHECKING:
    from peft import PeftModel


def merge_lora_keeping_zeros(model: "PeftModel") -> PreTrainedModel:
    """Merge the adapters of a pruned model so that zeros stay zero: ``W' = mask * (W + BA)``, and ``mask * W = W``.

    What an adapter adds where a weight was pruned is lost, so the merged model does not answer as the adapted one did:
    measure it again. Layers that are not pruned are merged as PEFT does. Any adapter that PEFT can merge will do; while
    it works a bit for every pruned weight is held.

    Args:
        model: what ``get_peft_model`` made of a pruned model, its adapters not merged.

    Returns:
        The base model, changed in place, without adapters; sparse layers are sparse layers still and are saved packed.

    Raises:
        ParedError: it has no adapters that can be merged, they are merged already, or none of its layers is pruned.
    """
    if not hasattr(model, "merge_and_unload"):
        raise ParedError(f"{type(model).__name__} has no adapters to merge; give what get_peft_model made")
    if merged := [name for name, module in model.named_modules() if getattr(module, "merged_adapters", None)]:
        raise ParedError(f"adapters are merged already, the first is {merged[0]}; call unmerge_adapter() first")
    layers = pruned_layers(model)
    if not layers:
        raise ParedError("none of the model's linear layers is pruned; merge_and_unload() of PEFT merges the rest")
    bits = {name: pack_mask(zeros_of(layer)) for name, layer in layers.items()}
    base = cast("PreTrainedModel", model.merge_and_unload())
    with torch.no_grad():
        for name, layer in layers.items():
            weight = cast("nn.Parameter", layer.weight)
            weight.masked_fill_(unpack_mask(bits[name], tuple(weight.shape)), 0)
    return base
