"""LLM-Pruner: what dependent weights are worth to the loss, to first order (Ma et al., NeurIPS 2023, arXiv 2305.11627).

Element by element: ``I = Σ |W ⊙ ∂L/∂W|`` over all weights that have to go together, those of a channel in the layers
that make it and in the layer that reads it; of an attention all of a head's. Nothing makes up for what goes.
"""

from collections.abc import Sequence

import torch

from pared.widths.layers import Maker
from pared.widths.removal import Channels, in_order_of

GRADIENT = "weight_gradient"  # the statistic, row by row of the weight


def order_channels(W_ON: torch.Tensor, gradient: torch.Tensor, makers: Sequence[Maker], inputs: int = 1) -> Channels:
    """Order the channels of a group by the first-order change of the loss if all weights of a channel were zero.

    Args:
        W_ON: the weight that reads the channels ``(out, in)``, any floating dtype.
        gradient: of the loss through each of its weights, in its order; any shape.
        makers: the layers that make the channels, with their ``weight_gradient``.
        inputs: of the weight that one channel has, side by side.

    Raises:
        ValueError: a gradient is not finite.
    """
    scores_N = _salience(W_ON, gradient).sum(dim=0)
    made_G = sum((_salience(one.W_ON, one.statistics[GRADIENT]).sum(dim=1)[one.rows_GR].sum(dim=1) for one in makers),
                 start=scores_N.new_zeros(len(scores_N) // inputs))  # fmt: skip
    return in_order_of(scores_N + made_G.repeat_interleave(inputs) / inputs, W_ON, inputs)


def _salience(W_ON: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    """Return ``|W ⊙ ∂L/∂W|``, ``(out, in)``, float64."""
    if not bool(gradient.isfinite().all()):
        raise ValueError("a gradient of the loss through its weights is not finite")
    return (W_ON.double() * gradient.double().view_as(W_ON)).abs()
