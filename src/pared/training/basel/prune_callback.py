"""Dropping bases while the Trainer trains: what they are worth is followed, and at their steps the least go."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainerState, TrainingArguments

from pared.training.basel.importance import curvature, fisher, magnitude, taylor
from pared.training.basel.layer import BasisLinear
from pared.training.basel.schedule import mass_after
from pared.training.basel.select import Weight, by_budget, keep_by_cumulative, share_for

NEAR = 0.1  # of the mass asked for that more may be left before it is reported
BatchLoss = Callable[[nn.Module], torch.Tensor]


class Prune(TrainerCallback):
    """Drops bases before certain steps.

    With a share of the mass every layer is pruned on its own, as in the paper; what a prune could not drop, as the
    least basis holds more than it may take, the next ones may. With sizes, coefficients are cut at the share, one for
    all layers, that leaves so many numbers; the other importances are losses, of one unit in all layers, and are cut by
    one threshold on the loss per number.

    Args:
        layers: by name.
        weights: their shapes, by the same names.
        steps: before which a part is dropped, one entry a time.
        share: K, of the importance that is left after all times; after j of N it is ``K^(j/N)``.
        sizes: numbers that are left after each time, in place of the share.
        importance: ``magnitude``, ``fisher`` or ``bsi``.
        probes: of the curvature, for ``bsi``.
        losses: of the rows that gradients are taken on, one each, for ``fisher`` and ``bsi``.
        model: that the layers are in.
    """

    def __init__(
        self,
        layers: Mapping[str, BasisLinear],
        weights: Mapping[str, Weight],
        steps: tuple[int, ...],
        share: float,
        sizes: tuple[int, ...] | None,
        importance: str,
        probes: int,
        losses: Sequence[BatchLoss],
        model: nn.Module,
    ) -> None:
        self.layers, self.weights, self.steps = dict(layers), dict(weights), steps
        self.share, self.sizes, self.importance = share, sizes, importance
        self.probes, self.losses, self.model = probes, tuple(losses), model

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, *_: Any, **__: Any) -> None:
        """Drop as often as this step asks for."""
        del args
        for index, step in enumerate(self.steps):
            if step == state.global_step:
                self._drop(index)

    def meet(self, size: int) -> None:
        """Drop what is more than so many numbers, by one threshold over all layers on importance per number."""
        self._keep(by_budget(self._left(), self.weights, size))

    def meet_mass(self) -> None:
        """Drop, layer by layer, all but the fewest bases that hold what is to be left in the end."""
        self._drop_mass(self.share)

    def reached(self) -> dict[str, float | int]:
        """Return what is left of bases, and of the mass: mean and largest over the layers, and what was asked for."""
        layers = self.layers.values()
        counts = {
            "bases": sum(len(layer.mask) for layer in layers),
            "bases_left": sum(int(layer.mask.sum()) for layer in layers),
        }
        if self.sizes is not None:
            return dict(counts)
        masses = [float(layer.mass) for layer in layers]
        return {
            "mass_asked": self.share,
            "mass_left": sum(masses) / len(masses),
            "mass_left_most": max(masses),
            **counts,
        }

    def shortfalls(self) -> list[str]:
        """Say where more of the mass is left than was asked for, as whole bases are dropped."""
        over = {name: float(layer.mass) for name, layer in self.layers.items()
                if float(layer.mass) > (1 + NEAR) * self.share}  # fmt: skip
        if self.sizes is not None or not over:
            return []
        worst = max(over, key=lambda name: over[name])
        mean = sum(float(layer.mass) for layer in self.layers.values()) / len(self.layers)
        few = self.layers[worst].mask
        return [
            f"keep_ratio {self.share:g} is missed in {len(over)} of {len(self.layers)} layers, on the average "
            f"{mean:.3g} of the mass is left: the fewest bases that hold so much hold more, most in {worst} "
            f"({over[worst]:.3g} in {int(few.sum())} of {len(few)} bases)"
        ]

    def _drop(self, index: int) -> None:
        if self.sizes is None:
            self._drop_mass(mass_after(self.share, index + 1, len(self.steps)))
            return
        worth = self._left()
        if self.importance == "magnitude":
            share = share_for(worth, self.weights, self.sizes[index])
            self._keep({name: keep_by_cumulative(worth_R, share) for name, worth_R in worth.items()})
        else:
            self._keep(by_budget(worth, self.weights, self.sizes[index]))

    def _drop_mass(self, wanted: float) -> None:
        """Drop what is more than this share of the mass, counted from the first prune on."""
        for name, worth_R in self._left().items():
            layer, worth_R = self.layers[name], worth_R.double().clamp(min=0)
            mask_R = keep_by_cumulative(worth_R, min(1.0, wanted / float(layer.mass)))
            layer.keep_(mask_R)
            if float(worth_R.sum()) > 0:
                layer.mass *= float(worth_R[mask_R].sum() / worth_R.sum())

    def _keep(self, masks: Mapping[str, torch.Tensor]) -> None:
        for name, mask_R in masks.items():
            self.layers[name].keep_(mask_R)

    def _left(self) -> dict[str, torch.Tensor]:
        """Return what every basis is worth, minus infinity for those that were dropped."""
        found = self.importances()
        return {name: found[name].masked_fill(~layer.mask, -math.inf) for name, layer in self.layers.items()}

    def importances(self) -> dict[str, torch.Tensor]:
        """Return what every basis is worth now."""
        if self.importance == "magnitude":
            return {name: magnitude(layer.coefficients) for name, layer in self.layers.items()}
        c = {name: layer.coefficients for name, layer in self.layers.items()}
        if self.importance == "fisher":
            square = {name: torch.zeros_like(c_R) for name, c_R in c.items()}
            for loss in self.losses:
                for name, g_R in self.gradients_at(c, (loss,)).items():
                    square[name] += g_R.square() / len(self.losses)
            return {name: fisher(c[name], square[name]) for name in c}
        left = int(sum(layer.mask.sum() for layer in self.layers.values()))
        g = self.gradients_at(c, self.losses)
        h = curvature(c, lambda at: self.gradients_at(at, self.losses), self.probes, 0.1,
                      torch.Generator().manual_seed(left))  # fmt: skip
        return {name: taylor(c[name], g[name], h[name]) for name in c}

    def gradients_at(
        self, coefficients: Mapping[str, torch.Tensor], losses: Sequence[BatchLoss]
    ) -> dict[str, torch.Tensor]:
        """Return the gradients of a mean of losses with respect to coefficients, at those; the model stays as it is."""
        layers = self.layers
        before = {name: layer.w.detach().clone() for name, layer in layers.items()}
        wanted = [(parameter, parameter.requires_grad) for parameter in self.model.parameters()]
        was_training = self.model.training
        self.model.requires_grad_(False).eval()
        try:
            for name, layer in layers.items():
                layer.w.data.copy_(coefficients[name].sqrt())
                layer.w.requires_grad_(True)
            weights = [layer.w for layer in layers.values()]
            sums = [torch.zeros_like(w_R) for w_R in weights]
            with torch.enable_grad():
                for loss in losses:
                    for total, part in zip(sums, torch.autograd.grad(loss(self.model), weights), strict=True):
                        total += part / len(losses)
            return {
                name: _by_coefficient(layer.w, sum_R) for (name, layer), sum_R in zip(layers.items(), sums, strict=True)
            }
        finally:
            for name, layer in layers.items():
                layer.w.data.copy_(before[name])
            for parameter, want in wanted:
                parameter.requires_grad_(want)
            self.model.train(was_training)


def _by_coefficient(w_R: torch.Tensor, gradient_R: torch.Tensor) -> torch.Tensor:
    """Return ``∂L/∂c`` from ``∂L/∂w``, where ``c = w²``."""
    w_R = w_R.detach()
    return torch.where(w_R == 0, torch.zeros_like(w_R), gradient_R / (2 * w_R))
