"""Magnitude pruning: the smallest weights go (Han et al., NeurIPS 2015, arXiv 1506.02626)."""

import torch

from pared.sparsity.masks import Pruned
from pared.sparsity.pattern import Pattern
from pared.sparsity.solution import RankedWeights


def solve(W_ON: torch.Tensor) -> RankedWeights:
    """Rank a weight's entries by ``|W_ij|``, over the whole matrix, or within a group of N:M.

    Args:
        W_ON: the weight ``(out, in)``, any floating dtype; what is kept stays bit for bit.
    """
    return RankedWeights(W_ON, W_ON.double().abs(), "matrix")


def prune(W_ON: torch.Tensor, pattern: Pattern) -> Pruned:
    """Prune a weight by ``|W_ij|``, compared over the whole matrix, or within a group of N:M.

    Args:
        W_ON: the weight ``(out, in)``, any floating dtype; what is kept stays bit for bit.
        pattern: which zeros.

    Raises:
        ValueError: the weight is not finite, or its inputs do not fit the pattern.
    """
    return solve(W_ON).realize(pattern)
