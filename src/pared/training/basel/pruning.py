"""Dropping bases while the Trainer trains: what they are worth is followed, and at their steps the least go."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainerState, TrainingArguments

from pared.training.basel.choose import Weight, by_budget, by_mass, share_for
from pared.training.basel.importance import curvature, fisher, magnitude, taylor
from pared.training.basel.layer import BasisLinear

FOLLOWED = ("slope", "slope_square")  # buffers of a layer: running means of ∂L/∂c and of its square
FORGET = 0.1  # of the running means at every step
BatchLoss = Callable[[nn.Module], torch.Tensor]


def follow(layer: BasisLinear) -> None:
    """Give a layer the running means that importances are made of."""
    for name in FOLLOWED:
        layer.register_buffer(name, torch.zeros_like(layer.w))


class Prune(TrainerCallback):
    """Drops bases before certain steps.

    With a share of the mass every layer is pruned on its own, as in the paper. With sizes, coefficients are cut at the
    share, one for all layers, that leaves so many numbers; the other importances are losses, of one unit in all layers,
    and are cut by one threshold on the loss per number.

    Args:
        layers: by name.
        weights: their shapes, by the same names.
        steps: before which a part is dropped, one entry a time.
        share: of the importance that every time keeps.
        sizes: numbers that are left after each time, in place of the share.
        importance: ``magnitude``, ``fisher`` or ``bsi``.
        probes: of the curvature, for ``bsi``.
        probe_loss: of the rows that the curvature is taken on, for ``bsi``.
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
        probe_loss: BatchLoss,
        model: nn.Module,
    ) -> None:
        self.layers, self.weights, self.steps = dict(layers), dict(weights), steps
        self.share, self.sizes, self.importance = share, sizes, importance
        self.probes, self.probe_loss, self.model = probes, probe_loss, model

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, *_: Any, **__: Any) -> None:
        """Drop as often as this step asks for."""
        del args
        for index, step in enumerate(self.steps):
            if step == state.global_step:
                self._drop(index)

    def meet(self, size: int) -> None:
        """Drop what is more than so many numbers, by one threshold over all layers on importance per number."""
        self._keep(by_budget(self._left(), self.weights, size))

    def _drop(self, index: int) -> None:
        worth = self._left()
        if self.sizes is None:
            self._keep({name: by_mass(worth_R, self.share) for name, worth_R in worth.items()})
        elif self.importance == "magnitude":
            share = share_for(worth, self.weights, self.sizes[index])
            self._keep({name: by_mass(worth_R, share) for name, worth_R in worth.items()})
        else:
            self._keep(by_budget(worth, self.weights, self.sizes[index]))

    def _keep(self, masks: Mapping[str, torch.Tensor]) -> None:
        for name, mask_R in masks.items():
            self.layers[name].keep_(mask_R)

    def _left(self) -> dict[str, torch.Tensor]:
        """Return what every basis is worth, minus infinity for those that were dropped."""
        found = self.importances()
        return {name: found[name].masked_fill(~layer.mask, -math.inf) for name, layer in self.layers.items()}

    def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
        """Follow the gradients of the coefficients."""
        if self.importance == "magnitude":
            return
        for layer in self.layers.values():
            slope_R = slope(layer)
            layer.get_buffer("slope").lerp_(slope_R, FORGET)
            layer.get_buffer("slope_square").lerp_(slope_R.square(), FORGET)

    def importances(self) -> dict[str, torch.Tensor]:
        """Return what every basis is worth now."""
        if self.importance == "magnitude":
            return {name: magnitude(layer.coefficients) for name, layer in self.layers.items()}
        if self.importance == "fisher":
            return {
                name: fisher(layer.coefficients, layer.get_buffer("slope_square"))
                for name, layer in self.layers.items()
            }
        generator = torch.Generator().manual_seed(int(sum(layer.mask.sum() for layer in self.layers.values())))
        c = {name: layer.coefficients for name, layer in self.layers.items()}
        h = curvature(c, self.gradients_at, self.probes, 0.1, generator)
        return {name: taylor(c[name], layer.get_buffer("slope"), h[name]) for name, layer in self.layers.items()}

    def gradients_at(self, coefficients: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return the gradients of the probe's loss with respect to coefficients, at those; the model stays as it is."""
        layers = self.layers
        before = {name: layer.w.detach().clone() for name, layer in layers.items()}
        wanted = [(parameter, parameter.requires_grad) for parameter in self.model.parameters()]
        was_training = self.model.training
        self.model.requires_grad_(False).eval()
        try:
            for name, layer in layers.items():
                layer.w.data.copy_(coefficients[name].sqrt())
                layer.w.requires_grad_(True)
            with torch.enable_grad():
                parts = torch.autograd.grad(self.probe_loss(self.model), [layer.w for layer in layers.values()])
            return {
                name: _by_coefficient(layer.w, part) for (name, layer), part in zip(layers.items(), parts, strict=True)
            }
        finally:
            for name, layer in layers.items():
                layer.w.data.copy_(before[name])
            for parameter, want in wanted:
                parameter.requires_grad_(want)
            self.model.train(was_training)


def slope(layer: BasisLinear) -> torch.Tensor:
    """Return ``∂L/∂c`` of a layer after a backward pass, 0 where there is none."""
    return torch.zeros_like(layer.w) if layer.w.grad is None else _by_coefficient(layer.w, layer.w.grad)


def _by_coefficient(w_R: torch.Tensor, gradient_R: torch.Tensor) -> torch.Tensor:
    """Return ``∂L/∂c`` from ``∂L/∂w``, where ``c = w²``."""
    w_R = w_R.detach()
    return torch.where(w_R == 0, torch.zeros_like(w_R), gradient_R / (2 * w_R))
