"""Full training of a pruned model that leaves its zeros zero."""

from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import TrainerCallback, TrainingArguments

from pared.errors import ParedError
from pared.modules import SparseLinear
from pared.training.pruned import pruned_layers, zeros_of
from pared.training.sharding import is_sharded


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
