"""Sparsity by loss: one threshold on what a pruned weight costs; our own, the sibling of the ranks by loss.

If pruning weight i of unit u costs ``ℓ_ui``, and costs add up, the least total at a given number of pruned weights
prunes the cheapest of all units: one threshold, at which every unit pays the same for the next parameter. Costs must be
in one unit everywhere, such as nats (``½ w² · E[x²] · E[g²]``, the diagonals of K-FAC's factors, by which LLM Surgeon,
arXiv 2312.17244, prunes); scores of Wanda are not.
"""

from collections.abc import Sequence

import torch

from pared.allocation.dsa.scores import ScoreHistogram, Scores, as_scores
from pared.allocation.sparsity.threshold import global_threshold
from pared.allocation.sparsity_budget import MOST
from pared.errors import ParedError


def pruning_loss(losses: Scores | ScoreHistogram | torch.Tensor, sparsity: float) -> float:
    """Return the expected loss of pruning the cheapest fraction of a unit, the sum of its smallest losses.

    Convex, 0 at 0, the sum of all at 1. Inside a value that stands for many, in proportion.

    Args:
        losses: of every weight of the unit.
        sparsity: the fraction, in [0, 1].

    Raises:
        ParedError: the fraction is out of range, or there are no losses.
    """
    if not 0 <= sparsity <= 1:
        raise ParedError(f"a fraction of a unit's weights is in [0, 1]; got {sparsity}")
    found = as_scores(losses)
    order_N = found.values_N.argsort()
    values_N, weights_N = found.values_N[order_N], found.weights_N[order_N]
    before_N = weights_N.cumsum(0) - weights_N
    taken_N = torch.minimum((sparsity * found.count - before_N).clamp(min=0), weights_N)
    return float((values_N * taken_N).sum())


def least_loss(
    losses_by_unit: Sequence[Scores | ScoreHistogram | torch.Tensor],
    sparsity: float,
    *,
    by_parameters: bool = True,
    most: float | Sequence[float] = MOST,
) -> torch.Tensor:
    """Return the sparsities of the least sum of :func:`pruning_loss` over the units.

    Args:
        losses_by_unit: of every weight of each unit, as a histogram or as they are, in one unit of loss.
        sparsity: the mean S.
        by_parameters: the mean is over parameters; else over units, and the threshold is on the loss of a fraction of a
            unit, that of a parameter times their number.
        most: the largest sparsity of a unit, or of each; what they may not take, the others do.

    Raises:
        ParedError: as :func:`pared.allocation.sparsity.global_threshold`.
    """
    units = [as_scores(found) for found in losses_by_unit]
    if not by_parameters:
        units = [unit.scaled(unit.count) for unit in units]
    return global_threshold(units, sparsity, by_parameters=by_parameters, most=most)
