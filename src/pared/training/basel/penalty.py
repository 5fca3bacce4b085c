"""Basel's ablation: an L1 penalty on the coefficients in place of dropping bases by importance during training."""

from collections.abc import Mapping
from typing import Any

import torch
from transformers import TrainerCallback, TrainerState, TrainingArguments

from pared.training.basel.layer import BasisLinear
from pared.training.method import Batch, own_loss


class L1(TrainerCallback):
    """Adds ``λ · mean over layers of Σ c / Σ c₀`` to the loss, from a step on.

    Coefficients ``c = w²`` are never negative, so that their sum is their L1 norm; divided by what it was at first it
    is the share of the mass that is left, of one scale in all layers. The paper's own scale is not known to us.

    Args:
        layers: by name.
        weight: λ, in nats.
        first: the step it begins with, counted from 0; the first of the pruning phase.
    """

    def __init__(self, layers: Mapping[str, BasisLinear], weight: float, first: int) -> None:
        self.layers, self.weight, self.first = dict(layers), weight, first
        self.begun = False
        self._before = {name: float(layer.coefficients.sum()) for name, layer in layers.items()}

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, *_: Any, **__: Any) -> None:
        """Begin, or not yet."""
        del args
        self.begun = state.global_step >= self.first

    def penalty(self) -> torch.Tensor:
        """Return the mean over layers of the share of their mass that is left, with its gradient."""
        shares = [layer.w.square().sum() / self._before[name] for name, layer in self.layers.items()]
        return torch.stack(shares).mean()

    def loss(self, model: Any, batch: Batch) -> torch.Tensor:
        """Return the model's own loss of a batch, with the penalty once it has begun."""
        own = own_loss(model, batch)
        return own + self.weight * self.penalty() if self.begun else own
