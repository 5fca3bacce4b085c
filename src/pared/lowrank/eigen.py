"""Eigenvectors of large Grams: the strongest in float64, the others in float32, checked; 0.7 of the time at 2,048.

Float32 alone errs by its rounding of the *largest* eigenvalue, and activations have a few channels that are thousands
of times as strong as the others: what is left out then costs up to twice what it must. With the strongest directions
taken out the rounding is that of the largest eigenvalue that is left. Whether that is good enough depends on how far
the spectrum falls, so it is measured on the result, and where it is not, all is computed in float64.

Legend of the shape suffixes: N the width, P the strongest directions, T more of them, S some that are looked at.
"""

import logging

import torch

log = logging.getLogger(__name__)

WIDTH = 1024  # up to which all is computed in float64: below, little or nothing is gained
STRONGEST, BESIDE = 32, 32  # directions found in float64, and how many more are iterated with them
TOP = 256  # directions that are made eigenvectors among themselves in float64 at the end
ITERATIONS = 4
LOOKED_AT = 64
TOLERANCE = 2e-7  # of what a rank leaves out: how much more than the least that may be, as it is estimated


def eigh(C_NN: torch.Tensor, width: int = WIDTH) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the eigenvalues of a Gram, rising, and its eigenvectors, columns, float64.

    Above the width, directions are orthonormal to the rounding of float32 and the eigenvalues are the exact energies of
    those directions; leaving out any but the first k, for k up to half of the width, costs within 1e-6 of the least.

    Args:
        C_NN: symmetric, positive semi-definite, float64 ``(n, n)``.
        width: up to which ``torch.linalg.eigh`` computes everything in float64.
    """
    if len(C_NN) > max(width, 2 * (STRONGEST + BESIDE)):
        if (found := _mixed(C_NN)) is not None:
            return found
        log.info("a Gram of %d features falls too far for float32: float64", len(C_NN))
    e_N, U_NN = torch.linalg.eigh(C_NN)
    return e_N, U_NN


def _mixed(C_NN: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Return eigenvalues and eigenvectors partly computed in float32; None where that is not exact enough."""
    Q_NP, after = _strongest(C_NN)
    if not after > 0:
        return None
    # (I - Q Qᵀ) C (I - Q Qᵀ) + σ Q Qᵀ: no larger than what is left, and Q apart from it, at the top.
    sigma = 2 * after
    CQ_NP = C_NN @ Q_NP
    H_PP = Q_NP.T @ CQ_NP
    H_PP.diagonal().add_(sigma)
    A_NP = CQ_NP - Q_NP @ H_PP / 2
    rest_NN = torch.addmm(C_NN, Q_NP, A_NP.T, alpha=-1).addmm_(A_NP, Q_NP.T, alpha=-1)
    V_NN = torch.linalg.eigh(rest_NN.div_(sigma).float()).eigenvectors
    del rest_NN
    U_NN = torch.cat([V_NN[:, :-STRONGEST].to(C_NN.dtype), Q_NP], dim=1)
    del V_NN
    U_NN[:, :-STRONGEST].addmm_(Q_NP, Q_NP.T @ U_NN[:, :-STRONGEST], alpha=-1)  # what float32 left of the strongest
    # The weakest of the strongest have not converged where the spectrum is flat there.
    top_NT = torch.linalg.qr(U_NN[:, -min(TOP, len(C_NN) // 2) :]).Q
    S_TT = torch.linalg.eigh(top_NT.T @ (C_NN @ top_NT)).eigenvectors
    U_NN[:, -top_NT.shape[1] :] = top_NT @ S_TT
    e_N = (C_NN @ U_NN).mul_(U_NN).sum(dim=0)
    order_N = e_N.argsort(stable=True)
    e_N, U_NN = e_N[order_N], U_NN[:, order_N]
    return (e_N, U_NN) if _excess(C_NN, e_N, U_NN) <= TOLERANCE else None


def _strongest(C_NN: torch.Tensor) -> tuple[torch.Tensor, float]:
    """Return the strongest directions ``(n, p)``, the strongest last, and the largest eigenvalue there is besides."""
    # Any start that is not orthogonal to them serves; this one is the same on every machine.
    generator = torch.Generator().manual_seed(0)
    Y_NP = torch.randn(len(C_NN), STRONGEST + BESIDE, generator=generator, dtype=torch.float64).to(C_NN)
    for _ in range(ITERATIONS):
        Y_NP = torch.linalg.qr(C_NN @ Y_NP).Q
    e_P, S_PP = torch.linalg.eigh(Y_NP.T @ (C_NN @ Y_NP))
    return Y_NP @ S_PP[:, BESIDE:], float(e_P[BESIDE - 1])


def _excess(C_NN: torch.Tensor, e_N: torch.Tensor, U_NN: torch.Tensor) -> float:
    """Estimate how much more than the least leaving directions out costs, relative, at the worst rank up to half.

    Between what is kept, i, and what is not, j, there is ``h = u_iᵀ (C - e_i) u_j``, which is 0 for eigenvectors;
    turning the two by ``h / (e_i - e_j)`` would lower the cost by ``h² / (e_i - e_j)``. The j are some, evenly spread.
    """
    width = len(C_NN)
    places_S = torch.arange(width // LOOKED_AT // 2, width, width // LOOKED_AT, device=C_NN.device)
    U_NS, e_S = U_NN[:, places_S], e_N[places_S]
    H_NS = U_NN.T @ (C_NN @ U_NS) - e_N[:, None] * (U_NN.T @ U_NS)
    gaps_NS = (e_N[:, None] - e_S).clamp(min=0)
    costs_NS = torch.minimum(H_NS.square() / gaps_NS.clamp(min=torch.finfo(e_N.dtype).tiny), gaps_NS)
    of_kept_NS = costs_NS.flip(0).cumsum(dim=0).flip(0)  # over i and all above
    left_N = e_N.clamp(min=0).cumsum(dim=0)
    # Cut half a stride above every place that is looked at: that one and those below it are left out.
    cuts_S = places_S + width // LOOKED_AT // 2
    worst = 0.0
    for number, cut in enumerate(cuts_S.tolist()):
        if width // 2 <= cut < width:
            excess = float(of_kept_NS[cut, : number + 1].sum()) * width / LOOKED_AT
            worst = max(worst, excess / max(float(left_N[cut - 1]), torch.finfo(e_N.dtype).tiny))
    return worst
