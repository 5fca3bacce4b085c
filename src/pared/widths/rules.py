"""From a weight, its statistics and a method's options to the order of its channels: what methods declare."""

from dataclasses import replace

import torch

from pared.lowrank import loss_optimal
from pared.lowrank.registry import LossOptimal, Statistics, output_gradient
from pared.lowrank.whitening import cholesky_factor
from pared.schema.options import Options
from pared.widths import flap, llm_pruner, modegpt, wanda_sp
from pared.widths.experts import Experts, MixtureMoments, by_loss, by_reap
from pared.widths.layers import GroupLayers
from pared.widths.registry import ModeGpt
from pared.widths.removal import Channels, remove_channels

NOT_READ = "nothing but zeros reach it on the text"


def both_sides(layers: GroupLayers, options: LossOptimal) -> Channels:
    """Weight inputs and outputs, damped as :mod:`pared.lowrank.loss_optimal` damps them.

    Args:
        layers: of the group.
        options: of the method.

    Raises:
        ValueError: a statistic is not finite, or negative.
    """
    W_ON, statistics = layers.W_ON, layers.statistics
    names = output_gradient(options)
    gradient = next((statistics[name] for name in names), W_ON.new_ones(()))
    reached = bool((gradient.diagonal() if gradient.ndim == 2 else gradient).any())
    # What was shrunk is of full rank already.
    damped = loss_optimal.root(
        gradient if reached else gradient.new_ones(()), len(W_ON), reached and options.output_shrinkage == 0
    )
    gram_NN, damping, read = _inputs(statistics, options.input_shrinkage == 0)
    found = remove_channels(W_ON, gram_NN, damped[0], least=layers.least, inputs=layers.inputs)
    found = replace(found, damping=max(damping, damped[1]))
    if read and reached:
        return found
    return _at_no_cost(found, "no gradient of the loss reaches it" if read else NOT_READ)


def nystroem(layers: GroupLayers, options: ModeGpt) -> Channels:
    """MoDeGPT's MLPs, the Gram damped as that of ``loss-optimal`` is.

    Raises:
        ValueError: the Gram is not finite, or negative.
    """
    gram_NN, damping, read = _inputs(layers.statistics, damp=True)
    found = modegpt.order_channels(layers.W_ON, gram_NN, options.ridge, layers.inputs)
    found = replace(found, damping=damping)
    return found if read else _at_no_cost(found, NOT_READ)


def _inputs(statistics: Statistics, damp: bool) -> tuple[torch.Tensor, float, bool]:
    """Return a positive definite Gram per token, its damping where it is more than the usual, and whether any is read.

    What reads nothing but zeros has the Gram of inputs that are all alike.
    """
    gram_NN = statistics["mean_gram"].double()
    read = bool(gram_NN.any())
    gram_NN = gram_NN if read else torch.eye(len(gram_NN), dtype=gram_NN.dtype, device=gram_NN.device)
    _, gram_NN, damping = cholesky_factor(gram_NN, loss_optimal.ladder(damp))
    return gram_NN, damping if damping > loss_optimal.DAMPING else 0.0, read


def _at_no_cost(found: Channels, why: str) -> Channels:
    fallback = f"{why}: its channels are ordered without that, at no cost"
    return replace(found, costs_N=torch.zeros_like(found.costs_N), fallback=fallback)


def fluctuating(layers: GroupLayers, _: Options) -> Channels:
    """FLAP."""
    own = layers.statistics
    return flap.order_channels(layers.W_ON, own["variance"], own["mean"], layers.inputs)


def sized(layers: GroupLayers, _: Options) -> Channels:
    """Wanda-sp."""
    return wanda_sp.order_channels(layers.W_ON, layers.statistics["energy"], layers.inputs)


def first_order(layers: GroupLayers, _: Options) -> Channels:
    """LLM-Pruner."""
    gradient = layers.statistics[llm_pruner.GRADIENT]
    return llm_pruner.order_channels(layers.W_ON, gradient, layers.makers(), layers.inputs)


def experts(layer: MixtureMoments, _: Options) -> Experts:
    """Order the experts of a mixture by the loss."""
    return by_loss(layer.M_EE)


def reap(layer: MixtureMoments, _: Options) -> Experts:
    """REAP."""
    return by_reap(layer.weighted_E, layer.picks_E)
