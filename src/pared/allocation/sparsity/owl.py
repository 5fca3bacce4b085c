"""OWL: blocks with many outlying scores are pruned less (L. Yin et al., ICML 2024, arXiv 2310.05175)."""

import torch

from pared.allocation.dsa.scores import ScoreHistogram, Scores, as_scores
from pared.allocation.sparsity_budget import spread

WIDTH = 0.08  # λ
MULTIPLE = 5.0  # the README's M for LLaMA-7B; the code's default is 3


def outlier_ratio(scores: Scores | ScoreHistogram | torch.Tensor, multiple: float = MULTIPLE) -> float:
    """Return how many scores of a block are above M times their mean, in percent.

    Of a histogram the mean is exact and the count is off by less than what the one bin holds that the threshold falls
    into: on 200,000 log-normal scores (σ = 2) by 4e-3 of the ratio at most, for M from 1 to 20, five seeds.

    Args:
        scores: of all weights of the block, ``|W_ij| · ||X_j||``.
        multiple: M.

    Raises:
        ParedError: there are no scores.
    """
    scores = as_scores(scores)
    return 100 * scores.above(multiple * scores.mean) / scores.count


def owl(
    outlier_ratios_L: torch.Tensor, sparsity: float, width: float = WIDTH, weights: torch.Tensor | None = None
) -> torch.Tensor:
    """Return ``s_l = S - 2λ (d_l - mean d)`` with ``d`` the outlier ratios moved and stretched to [0, 1].

    The released code replaces a sparsity of 0 and below by 0.01, which moves the mean; here all are moved instead.

    Args:
        outlier_ratios_L: of every block, from the dense model.
        sparsity: the mean S.
        width: λ.
        weights: parameters of the blocks ``(L,)``; every block counts the same if none.

    Raises:
        ParedError: a ratio is not finite, or the target is out of range.
    """
    return spread(outlier_ratios_L, sparsity, width, "keep", weights)
