"""Erdős-Rényi densities: small and flat weights stay denser (Mocanu et al., 2018; ER-plus keeps the last one dense)."""

from collections.abc import Sequence

import torch

from pared.allocation.sparsity_budget import MOST, meet, require_sparsity, shares


def er(
    shapes: Sequence[tuple[int, int]], sparsity: float, *, plus: bool = False, by_parameters: bool = True
) -> torch.Tensor:
    """Return ``s = 1 - min(1, c (m + n) / (m n))`` for every weight, with the c that gives the mean that is asked for.

    Args:
        shapes: ``(out, in)`` of every weight, in the model's order.
        sparsity: the mean S.
        plus: keep the last weight dense; the others compensate.
        by_parameters: the mean is over parameters, the size that is asked for; else over weights.

    Raises:
        ParedError: there are no weights, the target is out of range, or the last weight alone is too much.
    """
    require_sparsity(sparsity)
    shares(len(shapes), None)
    sizes_L = torch.tensor(shapes, dtype=torch.float64)
    parameters_L = sizes_L.prod(1)
    ratio_L = sizes_L.sum(1) / parameters_L
    if plus:
        ratio_L[-1] = 1e30  # whatever c is

    def curve(t: float) -> torch.Tensor:
        return 1 - (ratio_L * -t).clamp(1 - MOST, 1)

    return meet(curve, -2 / float(ratio_L.min()), -1e-12, sparsity, parameters_L if by_parameters else None)
