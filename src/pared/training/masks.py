"""Zeros that stay zeros: where they are, full training that leaves them zero, adapters merged into pruned weights."""

import warnings
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel, TrainerCallback, TrainingArguments

from pared.errors import ParedError
from pared.modules import SparseLinear
from pared.modules.packing import pack_mask, unpack_mask
from pared.structure.linear import LINEAR_TYPES
from pared.training.distributed import is_sharded

if TYPE_CHECKING:
    from peft import PeftModel


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
    """Return the ids of modules that PEFT has added to the layers they adapt."""
    return {
        id(part)
        for module in model.modules()
        if isinstance(base := getattr(module, "base_layer", None), nn.Module)
        for part in set(module.modules()) - set(base.modules())
    }


class _Kept(NamedTuple):
    """A weight and its zeros, True where it stays zero."""

    weight: nn.Parameter
    zeros: torch.Tensor


class KeepZeros(TrainerCallback):
    """Keep the zeros of pruned layers exactly zero: ``Trainer(model, args, callbacks=[KeepZeros()], ...)``.

    It trains the weights that were kept as if there were no others. A gradient becomes zero where the weight is as soon
    as it is there, before the Trainer clips: gradients of pruned weights do not count in the norm, and no momentum
    gathers for them. Right after every step of the optimiser the weight becomes zero there too, whatever the optimiser
    made of it, so before anything is evaluated or saved. With AdamW, its decay, and clipping the kept weights move as
    under ``mask * weight``.

    The layers are those of :func:`~pared.training.pruned_layers` whose weights are trainable when training begins.
    Frozen ones, as under adapters, need no keeping; to merge those there is
    :func:`~pared.training.merge_lora_keeping_zeros`. Masks take a byte for every weight.

    Attributes:
        layers: names of the layers that are kept, once training has begun.
    """

    def __init__(self) -> None:
        self.layers: list[str] = []
        self._kept: list[_Kept] = []
        self._hooks: list[RemovableHandle] = []

    def on_train_begin(self, args: TrainingArguments, *_: Any, **kwargs: Any) -> None:
        """Find the zeros, and mask gradients from here on.

        Raises:
            ParedError: the model has no zeros to keep, a sparse layer is still packed, or parameters are sharded, as
                under FSDP and DeepSpeed.
        """
        model: nn.Module = kwargs["model"]
        in_shards = any(is_sharded(parameter) for parameter in model.parameters())
        if in_shards or getattr(args, "fsdp", None) or getattr(args, "deepspeed", None):
            raise ParedError("zeros are kept in whole weights, and FSDP and DeepSpeed hold them in shards; launch data "
                             "parallel: accelerate launch --multi_gpu, or torchrun --nproc-per-node N")  # fmt: skip
        layers = pruned_layers(model)
        if not layers:
            raise ParedError("KeepZeros found no zeros to keep: no linear layer of the model is pruned")
        self._release()
        self.layers = []
        for name, layer in layers.items():
            if isinstance(layer, SparseLinear) and layer.packed:
                raise ParedError(f"{name} is still packed and does not train; call unpack_() before making the Trainer")
            if isinstance(layer.weight, nn.Parameter) and layer.weight.requires_grad:
                self.layers.append(name)
                self._keep(layer.weight, zeros_of(layer))

    def on_optimizer_step(self, *_: Any, **__: Any) -> None:
        """Put the zeros back."""
        with torch.no_grad():
            for weight, zeros in self._kept:
                weight.masked_fill_(zeros, 0)

    def on_train_end(self, *_: Any, **__: Any) -> None:
        """Let the masks go."""
        self._release()

    def _keep(self, weight: nn.Parameter, zeros: torch.Tensor) -> None:
        def mask_gradient(parameter: torch.Tensor) -> None:
            if parameter.grad is not None:
                parameter.grad.masked_fill_(zeros, 0)

        self._kept.append(_Kept(weight, zeros))
        self._hooks.append(weight.register_post_accumulate_grad_hook(mask_gradient))  # type: ignore[no-untyped-call]

    def _release(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._kept, self._hooks = [], []


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
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "an adapter is merged into a pruned layer", UserWarning)
        base = cast("PreTrainedModel", model.merge_and_unload())
    with torch.no_grad():
        for name, layer in layers.items():
            weight = cast("nn.Parameter", layer.weight)
            weight.masked_fill_(unpack_mask(bits[name], tuple(weight.shape)), 0)
    return base
