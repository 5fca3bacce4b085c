"""Uniform sparsity: the same everywhere."""

import torch

from pared.allocation.sparsity_budget import shift_to_mean


def uniform(units: int, sparsity: float) -> torch.Tensor:
    """Return the same sparsity for every unit, float64 ``(L,)``; its mean is the same whatever units weigh.

    Raises:
        ParedError: there are no units, or the target is out of range.
    """
    return shift_to_mean(torch.zeros(units, dtype=torch.float64), sparsity)
