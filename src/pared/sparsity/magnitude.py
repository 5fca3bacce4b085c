"""Magnitude pruning: the smallest weights go (Han et al., NeurIPS 2015, arXiv 1506.02626)."""

import torch

from pared.sparsity import masks
from pared.sparsity.masks import Pruned
from pared.sparsity.pattern import NM, Pattern


def prune(W_ON: torch.Tensor, pattern: Pattern) -> Pruned:
    """Prune a weight by ``|W_ij|``, compared over the whole matrix, or within a group of N:M.

    Args:
        W_ON: the weight ``(out, in)``, any floating dtype; what is kept stays bit for bit.
        pattern: which zeros.

    Raises:
        ValueError: the weight is not finite, or its inputs do not fit the pattern.
    """
    scores_ON = W_ON.double().abs()
    if isinstance(pattern, NM):
        return masks.apply(W_ON, masks.per_group(scores_ON, pattern))
    return masks.apply(W_ON, masks.per_matrix(scores_ON, pattern))
