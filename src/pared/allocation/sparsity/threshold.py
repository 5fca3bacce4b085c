"""One threshold over the scores of all units: what "global" pruning comes to as sparsities."""

from collections.abc import Sequence

import torch

from pared.allocation.dsa.scores import ScoreHistogram, Scores, as_scores
from pared.allocation.sparsity_budget import MOST, meet, require_sparsity, shares
from pared.errors import ParedError


def global_threshold(
    scores_by_unit: Sequence[Scores | ScoreHistogram | torch.Tensor],
    sparsity: float,
    *,
    by_parameters: bool = True,
    most: float | Sequence[float] = MOST,
) -> torch.Tensor:
    """Return the fraction of every unit's scores that lies at or below one threshold.

    Scores that equal the threshold are shared out in proportion, so that the mean is exact. Global magnitude or Wanda
    pruning fails at high sparsity (5147 perplexity where uniform has 81, LLaMA-1-7B at 70%) because scores of
    different layers are not comparable; for scores that are, see :func:`pared.allocation.sparsity.least_loss`.

    Args:
        scores_by_unit: of every unit, as a histogram or as they are; a histogram's bins are cut linearly.
        sparsity: the mean S.
        by_parameters: the mean is over all scores; else over units.
        most: the largest sparsity of a unit, or of each.

    Raises:
        ParedError: there are no units, the target or a limit is out of range, or the limits do not allow the target.
    """
    require_sparsity(sparsity)
    units = [as_scores(found) for found in scores_by_unit]
    shares(len(units), None)
    most_L = torch.as_tensor(most, dtype=torch.float64).expand(len(units))
    if not bool(((most_L >= 0) & (most_L <= MOST)).all()):
        raise ParedError(f"the largest sparsity of a unit is in [0, {MOST:g}]; got {most_L.tolist()}")
    counts_L = torch.tensor([unit.count for unit in units], dtype=torch.float64)
    edges_K = torch.cat([edge for unit in units for edge in (unit.lows_N, unit.highs_N)]).cpu().sort().values
    edges_K = torch.cat([edges_K[:1] - edges_K[:1].abs() - 1, edges_K])  # below everything

    def curve(place: float) -> torch.Tensor:
        """Return the sparsities at a threshold between two edges; they rise in straight lines from one to the next."""
        at = min(int(place), len(edges_K) - 2)
        threshold = float(torch.lerp(edges_K[at], edges_K[at + 1], place - at))
        above_L = torch.tensor([unit.above(threshold) for unit in units], dtype=torch.float64)
        return torch.minimum(1 - above_L / counts_L, most_L)

    return meet(curve, 0.0, float(len(edges_K) - 1), sparsity, counts_L if by_parameters else None)
