"""The two factors of a weight, put into the form that bears rounding best, and fitted to what was rounded.

Legend of the shape suffixes: O outputs, N inputs, K the rank.
"""

import torch

from pared.lowrank.decomposition import Factors

FIT_DAMPING = 1e-4  # of the mean diagonal, where `up` is fitted to a rounded `down`


def balanced(factors: Factors) -> Factors:
    """Return factors of the same product whose ``up`` has columns of one size, float64."""
    up_OK, down_KN = factors.up.double(), factors.down.double()
    size_K = up_OK.square().mean(0).sqrt()
    size_K = size_K.masked_fill(size_K == 0, 1)
    return Factors(down=down_KN * size_K[:, None], up=up_OK / size_K)


def turned(factors: Factors) -> Factors:
    """Return factors of the same product, ``up`` with orthonormal columns: what pivots stand for, well conditioned."""
    Q_OK, R_KK = torch.linalg.qr(factors.up.double())
    P_NK, T_KK = torch.linalg.qr(factors.down.double().T)
    U_KK, s_K, Vh_KK = torch.linalg.svd(R_KK @ T_KK.T)
    return Factors(down=s_K[:, None] * (Vh_KK @ P_NK.T), up=Q_OK @ U_KK)


def fitted(factors: Factors, down_KN: torch.Tensor, gram_NN: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the ``up`` with which another ``down`` comes closest to the product, and the Gram of what it reads.

    ``U' = U D A D'ᵀ (D' A D'ᵀ)⁻¹`` of factors ``U D``, another ``D'`` and the Gram ``A`` of the inputs.

    Args:
        factors: the product, float64.
        down_KN: the other ``down (rank, in)``, float64.
        gram_NN: float64.
    """
    seen_NK = gram_NN @ down_KN.T
    latent_KK = down_KN @ seen_NK
    mean = latent_KK.diagonal().mean()
    if not bool(mean > 0):
        return factors.up, latent_KK
    eye_KK = torch.eye(len(latent_KK), dtype=latent_KK.dtype, device=latent_KK.device)
    # The damping draws to the `up` there is, not to zero.
    lost_KK = (factors.down - down_KN) @ seen_NK
    change_KK = torch.linalg.solve(latent_KK + FIT_DAMPING * mean * eye_KK, lost_KK.T).T
    return factors.up @ (eye_KK + change_KK), latent_KK
