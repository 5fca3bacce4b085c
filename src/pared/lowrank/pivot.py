"""Pivoted storage of a low-rank weight, after PIFA (arXiv 2501.19090): k of its own rows, and the others from those.

``W' = up @ down`` of rank k is, up to the order of its rows, ``[I; C] W_p`` with ``W_p`` k of its rows, the *pivots*:
``k (m + n) - k²`` numbers in place of ``k (m + n)``.

The paper chooses pivots by column-pivoted QR of ``W'ᵀ``. With ``up = Q T``, ``Q`` orthonormal, the coefficients are
``C = Q_rest Q_p⁻¹`` whatever ``T`` and ``down`` are, so ``Q`` alone decides how large they get. Pivots start from
Gaussian elimination of ``Q`` and are swapped as long as a coefficient exceeds a limit: every swap multiplies
``|det Q_p|`` by that coefficient, so it ends ("maxvol", Goreinov et al., 2010). Then ``Q_p`` is well conditioned, and
factors whose rank is below k are no exception. Elimination and swaps take a small part of the time of a pivoted QR
and end at coefficients as small.

Legend of the shape suffixes: O outputs, N inputs, K the rank, R the other rows, O - K.
"""

from typing import NamedTuple

import torch

from pared.lowrank.decomposition import Factors

LARGEST = 1.05  # coefficient that is left alone


class Pivoted(NamedTuple):
    """``W'[pivots] = W_p`` and ``W'[rest] = C @ W_p``, where ``rest`` are the other rows in rising order.

    Attributes:
        pivots_K: rows of ``W'``, rising, int64.
        W_KN: those rows ``(rank, in)``, float64.
        C_RK: coefficients of the other rows ``(out - rank, rank)``, float64.
        error: largest difference between ``up @ down`` and what is rebuilt from these in float64.
    """

    pivots_K: torch.Tensor
    W_KN: torch.Tensor
    C_RK: torch.Tensor
    error: float


def pivot(factors: Factors, largest: float = LARGEST) -> Pivoted:
    """Store a low-rank weight by its pivots; computed in float64.

    Args:
        factors: ``down (rank, in)`` and ``up (out, rank)`` of any floating dtype; their rank may be below k.
        largest: swap pivots until no coefficient is larger; more than 1.

    Raises:
        ValueError: the factors are not finite, do not fit each other, or have more columns than outputs.
    """
    down_KN, up_OK = factors.down.double(), factors.up.double()
    if up_OK.shape[1] != down_KN.shape[0] or up_OK.shape[1] > up_OK.shape[0]:
        raise ValueError(f"factors up {tuple(up_OK.shape)} and down {tuple(down_KN.shape)}: expected up (out, k) and "
                         "down (k, in) with k at most out")  # fmt: skip
    if not bool(up_OK.isfinite().all() and down_KN.isfinite().all()):
        raise ValueError("the factors hold NaN or infinity")
    if not largest > 1:
        raise ValueError(f"largest coefficient {largest}: no choice of pivots keeps all at or below 1; allow more")
    Q_OK = torch.linalg.qr(up_OK).Q
    pivots_K = _choose(Q_OK, largest).sort().values
    rest_R = other_rows(pivots_K, len(up_OK))
    C_RK = torch.linalg.solve(Q_OK[pivots_K], Q_OK[rest_R], left=False)
    W_KN = up_OK[pivots_K] @ down_KN
    error = up_OK[rest_R] @ down_KN - C_RK @ W_KN
    return Pivoted(pivots_K, W_KN, C_RK, float(error.abs().max()) if error.numel() else 0.0)


def unpivot(pivots_K: torch.Tensor, W_KN: torch.Tensor, C_RK: torch.Tensor) -> Factors:
    """Return two factors of the same weight, with no rounding: ``up`` holds the identity and ``C``."""
    rank = len(W_KN)
    up_OK = C_RK.new_empty(rank + len(C_RK), rank)
    up_OK[pivots_K] = torch.eye(rank, dtype=C_RK.dtype, device=C_RK.device)
    up_OK[other_rows(pivots_K, len(up_OK))] = C_RK
    return Factors(down=W_KN, up=up_OK)


def other_rows(pivots_K: torch.Tensor, rows: int) -> torch.Tensor:
    """Return the rows that are no pivots, rising."""
    is_rest_O = torch.ones(rows, dtype=torch.bool, device=pivots_K.device)
    is_rest_O[pivots_K] = False
    return is_rest_O.nonzero().flatten()


def _choose(Q_OK: torch.Tensor, largest: float) -> torch.Tensor:
    """Return k rows of an orthonormal ``Q`` of which every other row is a combination with small coefficients."""
    rank = Q_OK.shape[1]
    rows_O, L_OK = _eliminate(Q_OK)
    C_RK = torch.linalg.solve_triangular(L_OK[:rank], L_OK[rank:], upper=False, left=False, unitriangular=True)
    while C_RK.numel():
        row, column = divmod(int(C_RK.abs().argmax()), rank)
        coefficient = C_RK[row, column].clone()
        if coefficient.abs() <= largest:
            break
        rows_O[column], rows_O[rank + row] = rows_O[rank + row].clone(), rows_O[column].clone()
        step_K = C_RK[row] / coefficient
        step_K[column] -= 1 / coefficient
        C_RK.addr_(C_RK[:, column].clone(), step_K, alpha=-1)
        C_RK[row] = -step_K
        C_RK[row, column] += 1
    return rows_O[:rank]


def _eliminate(Q_OK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the order of rows that Gaussian elimination with partial pivoting takes, and the lower factor."""
    LU_OK, swaps_K = torch.linalg.lu_factor(Q_OK)
    order = list(range(len(Q_OK)))
    for step, other in enumerate((swaps_K - 1).tolist()):
        order[step], order[other] = order[other], order[step]
    return torch.tensor(order, device=Q_OK.device), LU_OK.tril(-1)
