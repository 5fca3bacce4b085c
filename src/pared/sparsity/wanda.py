"""Wanda: weights by their size and that of their inputs (Sun et al., ICLR 2024, arXiv 2306.11695).

``S_ij = |W_ij| · ||X_j||₂``, compared within every output; no weight is changed.
"""

import torch

from pared.sparsity.masks import Pruned
from pared.sparsity.pattern import Pattern
from pared.sparsity.solution import RankedWeights

BELOW = 2.0**-500  # of the least living norm: below whatever float32 weights differ by, and far from underflow


def solve(W_ON: torch.Tensor, energy_N: torch.Tensor, variant: bool = False) -> RankedWeights:
    """Rank a weight's entries by ``|W_ij| · √energy_j``, within every output, or within a group of N:M.

    Args:
        W_ON: the weight ``(out, in)``, any floating dtype; what is kept stays bit for bit.
        energy_N: ``Σ x²`` of every input feature over tokens ``(in,)``, any scale. Weights of inputs that were always
            zero are compared by size, and go before all others.
        variant: every output gives up the same share of its scores rather than as many weights.

    Raises:
        ValueError: the energy is negative, not finite, or of another width than the weight.
    """
    scores_ON = scores(W_ON, energy_N)
    return RankedWeights(W_ON, _telling_dead_apart(W_ON, energy_N, scores_ON), "share" if variant else "row", scores_ON)


def prune(W_ON: torch.Tensor, energy_N: torch.Tensor, pattern: Pattern, variant: bool = False) -> Pruned:
    """Prune a weight by ``|W_ij| · √energy_j``, compared within every output, or within a group of N:M.

    Args:
        W_ON: as in :func:`solve`.
        energy_N: as in :func:`solve`.
        pattern: which zeros.
        variant: as in :func:`solve`.

    Raises:
        ValueError: the weight or the energy is not finite, the energy is negative or of another width, the inputs do
            not fit the pattern, or the variant is asked for N:M.
    """
    return solve(W_ON, energy_N, variant).realize(pattern)


def _telling_dead_apart(W_ON: torch.Tensor, energy_N: torch.Tensor, scores_ON: torch.Tensor) -> torch.Tensor:
    """Return scores ``(out, in)``, float64, that tell weights of dead inputs apart too.

    Those go before all others, the smallest first, rather than the first of them; if all inputs are dead, that is
    pruning by magnitude.
    """
    dead_N = energy_N == 0
    if not bool(dead_N.any()):
        return scores_ON
    if bool(dead_N.all()):
        return W_ON.double().abs()
    least = energy_N.double()[~dead_N].min().sqrt()
    return torch.where(dead_N, W_ON.double().abs() * (BELOW * least), scores_ON)


def scores(W_ON: torch.Tensor, energy_N: torch.Tensor) -> torch.Tensor:
    """Return ``|W_ij| · √energy_j`` ``(out, in)``, float64.

    Raises:
        ValueError: the energy is negative, not finite, or of another width than the weight.
    """
    if energy_N.shape != W_ON.shape[1:]:
        raise ValueError(f"energy of shape {tuple(energy_N.shape)} for a weight {tuple(W_ON.shape)}: expected (in,)")
    energy_N = energy_N.double()
    if not bool(energy_N.isfinite().all()) or bool((energy_N < 0).any()):
        raise ValueError("an input energy is negative or not finite")
    return W_ON.double().abs() * energy_N.sqrt()
