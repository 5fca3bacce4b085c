"""Weighting by the root of a Gram without memory of the Gram's size: factored where it lies, and put back.

Half of a symmetric matrix says all: its Cholesky factor takes the place of the lower half, and the upper one restores
it afterwards. Of the outputs of a layer of 8,192 each copy would be half a gigabyte in float64.
"""

from collections.abc import Iterator

import torch

PANEL = 512  # columns that are factored at once; what is worked in besides is as wide


def weighted_by_root(
    gram_NN: torch.Tensor, W_NM: torch.Tensor, dampings: tuple[float, ...], least_pivot: float
) -> tuple[torch.Tensor, float] | None:
    """Return ``Lᵀ W`` with ``L Lᵀ = G + λ·mean(diag G)·I``, and the first λ of a ladder that makes it full rank.

    Args:
        gram_NN: ``G``, symmetric, float64; worked in, and afterwards what it was.
        W_NM: float64 ``(n, m)``.
        dampings: the ladder, rising.
        least_pivot: smallest ratio of squared Cholesky pivots that counts as full rank.

    Returns:
        ``(n, m)`` float64 and λ; None if no λ of the ladder is enough.
    """
    diagonal_N = gram_NN.diagonal().clone()
    mean = float(diagonal_N.mean())
    try:
        for damping in dampings:
            gram_NN.diagonal().copy_(diagonal_N + damping * mean)
            if _factor_lower(gram_NN):
                pivots_N = gram_NN.diagonal()
                if (pivots_N.min() / pivots_N.max()).square() > least_pivot:
                    return _times_root(gram_NN, W_NM), damping
            _restore_lower(gram_NN)
    finally:
        _restore_lower(gram_NN)
        gram_NN.diagonal().copy_(diagonal_N)
    return None


def _panels(size: int) -> Iterator[tuple[slice, slice]]:
    """Yield every panel and what is below it."""
    for start in range(0, size, PANEL):
        yield slice(start, min(start + PANEL, size)), slice(min(start + PANEL, size), size)


def _factor_lower(A_NN: torch.Tensor) -> bool:
    """Put the Cholesky factor in the place of the lower half, diagonal included; whether there is one."""
    for own, below in _panels(len(A_NN)):
        before = slice(0, own.start)
        corner_PP = torch.addmm(A_NN[own, own], A_NN[own, before], A_NN[own, before].T, alpha=-1)
        L_PP, failed = torch.linalg.cholesky_ex(corner_PP)
        if int(failed):
            return False
        A_NN[own, own] = L_PP + A_NN[own, own].triu(1)
        if below.start < below.stop:
            rest_RP = A_NN[below, own].addmm_(A_NN[below, before], A_NN[own, before].T, alpha=-1)
            rest_RP.copy_(torch.linalg.solve_triangular(L_PP.T, rest_RP, upper=True, left=False))
    return True


def _times_root(L_NN: torch.Tensor, W_NM: torch.Tensor) -> torch.Tensor:
    """Return ``Lᵀ W``; only the lower half of ``L`` is read."""
    weighted_NM = torch.empty_like(W_NM)
    for own, below in _panels(len(L_NN)):
        torch.mm(L_NN[own, own].tril().T, W_NM[own], out=weighted_NM[own])
        weighted_NM[own].addmm_(L_NN[below, own].T, W_NM[below])
    return weighted_NM


def _restore_lower(A_NN: torch.Tensor) -> None:
    """Make a matrix symmetric by its upper half; the diagonal stays."""
    for own, below in _panels(len(A_NN)):
        corner_PP = A_NN[own, own].triu()
        A_NN[own, own] = corner_PP + corner_PP.triu(1).T
        A_NN[below, own] = A_NN[own, below].T
