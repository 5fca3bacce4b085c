"""From a weight, its statistics and a method's options to the order of its channels: what methods declare."""

from dataclasses import replace

import torch

from pared.lowrank import loss_optimal
from pared.lowrank.registry import LossOptimal, Statistics, output_gradient
from pared.lowrank.whitening import cholesky_factor
from pared.widths.removal import Channels, remove_channels


def both_sides(
    W_ON: torch.Tensor, statistics: Statistics, options: LossOptimal, least: int = 0, inputs: int = 1
) -> Channels:
    """Weight inputs and outputs, damped as :mod:`pared.lowrank.loss_optimal` damps them.

    Args:
        W_ON: the weight that reads the channels ``(out, in)``.
        statistics: of its site, by name.
        options: of the method.
        least: the smallest width that is of interest.
        inputs: of the weight that one channel has, side by side.

    Raises:
        ValueError: a statistic is not finite, or negative.
    """
    names = output_gradient(options)
    gradient = next((statistics[name] for name in names), W_ON.new_ones(()))
    gram_NN = statistics["mean_gram"].double()
    reached = bool((gradient.diagonal() if gradient.ndim == 2 else gradient).any())
    read = bool(gram_NN.any())
    # What was shrunk is of full rank already.
    damped = loss_optimal.root(
        gradient if reached else gradient.new_ones(()), len(W_ON), reached and options.output_shrinkage == 0
    )
    ladder = loss_optimal.ladder(options.input_shrinkage == 0)
    gram_NN = gram_NN if read else torch.eye(len(gram_NN), dtype=gram_NN.dtype, device=gram_NN.device)
    _, gram_NN, damping = cholesky_factor(gram_NN, ladder)
    found = remove_channels(W_ON, gram_NN, damped[0], least=least, inputs=inputs)
    found = replace(found, damping=max(damping if damping > loss_optimal.DAMPING else 0.0, damped[1]))
    if read and reached:
        return found
    why = "no gradient of the loss reaches it" if read else "nothing but zeros reach it on the text"
    fallback = f"{why}: its channels are ordered without that, at no cost"
    return replace(found, costs_G=torch.zeros_like(found.costs_G), fallback=fallback)
