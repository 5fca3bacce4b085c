"""Pivoted storage of a low-rank weight, after PIFA (arXiv 2501.19090): k of its own columns, and the others from those.

``W' = up @ down`` of rank k is, up to the order of its columns, ``W_p [I | C]`` with ``W_p`` k of its columns, the
*pivots*: ``k (m + n) - k²`` numbers in place of ``k (m + n)``. The paper does the same with rows. Columns are put in
order before the product, on the input, where nothing has to be put together again after it.

The paper chooses pivots by column-pivoted QR. With ``downᵀ = Q T``, ``Q`` orthonormal, the coefficients are
``C = (Q_rest Q_p⁻¹)ᵀ`` whatever ``T`` and ``up`` are, so ``Q`` alone decides how large they get. Pivots start from
Gaussian elimination of ``Q`` and are swapped as long as a coefficient exceeds a limit: every swap multiplies
``|det Q_p|`` by that coefficient, so it ends ("maxvol", Goreinov et al., 2010). Then ``Q_p`` is well conditioned, and
factors whose rank is below k are no exception. Elimination and swaps take a small part of the time of a pivoted QR
and end at coefficients as small.

Legend of the shape suffixes: O outputs, N inputs, K the rank, R the other columns, N - K.
"""

from typing import NamedTuple

import torch

from pared.lowrank.decomposition import Factors

LARGEST = 1.05  # coefficient that is left alone


class Pivoted(NamedTuple):
    """``W'[:, pivots] = W_p`` and ``W'[:, rest] = W_p @ C``, where ``rest`` are the other columns in rising order.

    Attributes:
        pivots_K: columns of ``W'``, rising, int64.
        W_OK: those columns ``(out, rank)``, float64.
        C_KR: coefficients of the other columns ``(rank, in - rank)``, float64.
        error: largest difference between ``up @ down`` and what is rebuilt from these in float64.
    """

    pivots_K: torch.Tensor
    W_OK: torch.Tensor
    C_KR: torch.Tensor
    error: float


def pivot(factors: Factors, largest: float = LARGEST) -> Pivoted:
    """Store a low-rank weight by its pivots; computed in float64.

    Args:
        factors: ``down (rank, in)`` and ``up (out, rank)`` of any floating dtype; their rank may be below k.
        largest: swap pivots until no coefficient is larger; more than 1.

    Raises:
        ValueError: the factors are not finite, do not fit each other, or k is more than the inputs.
    """
    down_KN, up_OK = factors.down.double(), factors.up.double()
    if up_OK.shape[1] != down_KN.shape[0] or down_KN.shape[0] > down_KN.shape[1]:
        raise ValueError(f"factors up {tuple(up_OK.shape)} and down {tuple(down_KN.shape)}: expected up (out, k) and "
                         "down (k, in) with k at most in")  # fmt: skip
    if not bool(up_OK.isfinite().all() and down_KN.isfinite().all()):
        raise ValueError("the factors hold NaN or infinity")
    if not largest > 1:
        raise ValueError(f"largest coefficient {largest}: no choice of pivots keeps all at or below 1; allow more")
    Q_NK = torch.linalg.qr(down_KN.T).Q
    pivots_K = _choose(Q_NK, largest).sort().values
    rest_R = other_columns(pivots_K, len(Q_NK))
    C_KR = torch.linalg.solve(Q_NK[pivots_K].T, Q_NK[rest_R].T)
    W_OK = up_OK @ down_KN[:, pivots_K]
    error = up_OK @ down_KN[:, rest_R] - W_OK @ C_KR
    return Pivoted(pivots_K, W_OK, C_KR, float(error.abs().max()) if error.numel() else 0.0)


def unpivot(pivots_K: torch.Tensor, W_OK: torch.Tensor, C_KR: torch.Tensor) -> Factors:
    """Return two factors of the same weight, with no rounding: ``down`` holds the identity and ``C``."""
    rank = len(C_KR)
    down_KN = C_KR.new_empty(rank, rank + C_KR.shape[1])
    down_KN[:, pivots_K] = torch.eye(rank, dtype=C_KR.dtype, device=C_KR.device)
    down_KN[:, other_columns(pivots_K, down_KN.shape[1])] = C_KR
    return Factors(down=down_KN, up=W_OK)


def other_columns(pivots_K: torch.Tensor, columns: int) -> torch.Tensor:
    """Return the columns that are no pivots, rising."""
    is_rest_N = torch.ones(columns, dtype=torch.bool, device=pivots_K.device)
    is_rest_N[pivots_K] = False
    return is_rest_N.nonzero().flatten()


def _choose(Q_NK: torch.Tensor, largest: float) -> torch.Tensor:
    """Return k rows of an orthonormal ``Q`` of which every other row is a combination with small coefficients."""
    rank = Q_NK.shape[1]
    rows_N, L_NK = _eliminate(Q_NK)
    C_RK = torch.linalg.solve_triangular(L_NK[:rank], L_NK[rank:], upper=False, left=False, unitriangular=True)
    while C_RK.numel():
        row, column = divmod(int(C_RK.abs().argmax()), rank)
        coefficient = C_RK[row, column].clone()
        if coefficient.abs() <= largest:
            break
        rows_N[column], rows_N[rank + row] = rows_N[rank + row].clone(), rows_N[column].clone()
        step_K = C_RK[row] / coefficient
        step_K[column] -= 1 / coefficient
        C_RK.addr_(C_RK[:, column].clone(), step_K, alpha=-1)
        C_RK[row] = -step_K
        C_RK[row, column] += 1
    return rows_N[:rank]


def _eliminate(Q_NK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the order of rows that Gaussian elimination with partial pivoting takes, and the lower factor."""
    LU_NK, swaps_K = torch.linalg.lu_factor(Q_NK)
    order = list(range(len(Q_NK)))
    for step, other in enumerate((swaps_K - 1).tolist()):
        order[step], order[other] = order[other], order[step]
    return torch.tensor(order, device=Q_NK.device), LU_NK.tril(-1)
