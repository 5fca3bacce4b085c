"""What rounding is expected to cost: the second-order loss of the error that it makes, before anything is rounded.

An error ``E`` of a weight costs ``½ tr(B E A Eᵀ)`` nats a token, ``A`` the Gram of the inputs and ``B`` that of the
gradients at the outputs: the loss by which :mod:`pared.lowrank.loss_optimal` prices ranks. Numbers here are without the
half, as the squares of its singular values are.

Of factors ``U D`` both are rounded, and ``E = dU D + U dD`` but for the product of two errors. In a decomposition the
directions are orthogonal in both weightings (``Uᵀ B U`` and ``D A Dᵀ`` are diagonal), so the cost of a rank is a sum
over its directions, and those of all ranks are had at once.

Legend of the shape suffixes: O outputs, N inputs, R directions.
"""

import torch

from pared.lowrank.decomposition import Factors
from pared.quantization.factors import balanced
from pared.quantization.rounding import Grid, nearest, rounded


def price(E_ON: torch.Tensor, gram_NN: torch.Tensor | None, gradient: torch.Tensor | None) -> float:
    """Return ``tr(B E A Eᵀ)``.

    Args:
        E_ON: the error ``(out, in)``.
        gram_NN: ``A`` per token ``(in, in)``; the identity if none.
        gradient: ``B`` per token, full ``(out, out)``, its diagonal ``(out,)`` or one number; the identity if none.
    """
    return float(_rows(E_ON.double(), gram_NN, gradient).sum())


def _rows(E_ON: torch.Tensor, gram_NN: torch.Tensor | None, gradient: torch.Tensor | None) -> torch.Tensor:
    """Return what the error of every output adds to the price, ``(out,)``."""
    seen_ON = E_ON if gram_NN is None else E_ON @ gram_NN.double()
    if gradient is None:
        return (E_ON * seen_ON).sum(1)
    B = gradient.double()
    return ((B @ E_ON) * seen_ON).sum(1) if B.ndim == 2 else B * (E_ON * seen_ON).sum(1)


def prices(
    W_ON: torch.Tensor, factors: Factors, grid: Grid, gram_NN: torch.Tensor | None, gradient: torch.Tensor | None
) -> torch.Tensor:
    """Return what rounding costs: of the weight itself, then of its factors of rank 1, 2, ..., float64 ``(R + 1,)``.

    Args:
        W_ON: the weight ``(out, in)``.
        factors: of the highest rank that may be taken; those of a lower one are the first of its directions.
        grid: to which both would be rounded.
        gram_NN: as of :func:`price`.
        gradient: as of :func:`price`.

    Raises:
        ValueError: as :func:`pared.quantization.rounding.rounded`.
    """
    whole = price(rounded(W_ON, grid, gram_NN).weight().double() - W_ON.double(), gram_NN, gradient)
    directions = balanced(factors)
    down_RN, up_OR = directions.down, directions.up
    down_off_RN = rounded(down_RN, grid, gram_NN).weight().double() - down_RN
    up_off_OR = nearest(up_OR.float(), grid).weight().double() - up_OR
    by_down_R = _rows(down_off_RN, gram_NN, None) * _rows(up_OR.T, _matrix(gradient, len(W_ON)), None)
    by_up_R = _rows(down_RN, gram_NN, None) * _rows(up_off_OR.T, _matrix(gradient, len(W_ON)), None)
    return torch.cat((by_up_R.new_tensor([whole]), (by_down_R + by_up_R).cumsum(0)))


def _matrix(gradient: torch.Tensor | None, out_features: int) -> torch.Tensor | None:
    """Return ``B`` as a matrix, none for the identity."""
    return gradient if gradient is None or gradient.ndim == 2 else gradient.expand(out_features).diag()
