"""What every low-rank method of one weight comes down to: an orthonormal basis of outputs, best directions first.

Legend of the shape suffixes: O outputs, N inputs, R the most directions there can be, K the rank that is kept.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch

# Directions this much weaker than the strongest lose orthogonality when they come out of a Gram matrix.
WEAK = 1e-5


class Factors(NamedTuple):
    """``W' = up @ down``: ``down (rank, in)``, ``up (out, rank)``."""

    down: torch.Tensor
    up: torch.Tensor


@dataclass(frozen=True)
class Decomposition:
    """A weight and the directions of its outputs in the order of what they are worth.

    Any rank can be cut from one decomposition: ``W' = U_k U_kᵀ W``. With ``U`` the left singular vectors of
    ``W G^½`` that is the whitened SVD of SVD-LLM without an inverse; with those of ``W`` it is the plain SVD, with
    those of ``W diag(d)`` it is ASVD or FWSVD. If outputs are weighted too, by ``B = L Lᵀ``, the directions are those
    of ``Lᵀ W G^½`` and ``W' = L⁻ᵀ U_k U_kᵀ Lᵀ W``.

    Attributes:
        W_ON: the weight ``(out, in)``, float64.
        U_OR: the directions, columns, float64.
        singular_values_R: what leaving out direction j costs, falling.
        damping: what was added to the Gram's diagonal, relative to its mean; 0 if nothing.
        L_OO: the weighting of outputs: lower triangular ``(out, out)``, a diagonal ``(out,)``, or none.
    """

    W_ON: torch.Tensor
    U_OR: torch.Tensor
    singular_values_R: torch.Tensor
    damping: float = 0.0
    L_OO: torch.Tensor | None = None

    def loss(self, rank: int) -> float:
        """Return ``sqrt(Σ_{j>rank} s_j²)``, the (weighted) error ``||X (W - W')ᵀ L||_F`` the rank leaves."""
        return float(self.singular_values_R[rank:].square().sum().sqrt())

    def factors(self, rank: int) -> Factors:
        """Return the factors of one rank, float64; ``up`` has orthonormal columns if outputs are not weighted."""
        s_R = self.singular_values_R
        U_OK = self.U_OR[:, :rank]
        if s_R[rank - 1] <= WEAK * s_R[0]:
            U_OK = torch.linalg.qr(U_OK).Q  # same span, orthonormal again
        if self.L_OO is None:
            return Factors(down=U_OK.T @ self.W_ON, up=U_OK)
        down_KN = U_OK.T @ weigh_outputs(self.L_OO, self.W_ON)
        if self.L_OO.ndim == 1:
            return Factors(down=down_KN, up=U_OK / self.L_OO[:, None])
        return Factors(down=down_KN, up=torch.linalg.solve_triangular(self.L_OO.T, U_OK, upper=True))


def weigh_outputs(L_OO: torch.Tensor, W_ON: torch.Tensor) -> torch.Tensor:
    """Return ``Lᵀ W`` for a lower triangular ``L (out, out)`` or a diagonal ``(out,)``."""
    return L_OO[:, None] * W_ON if L_OO.ndim == 1 else L_OO.T @ W_ON


def from_output_gram(W_ON: torch.Tensor, C_OO: torch.Tensor, damping: float = 0.0) -> Decomposition:
    """Decompose by the eigenvectors of the Gram of the outputs, ``C = W G Wᵀ``: cheapest when out ≤ in."""
    e_O, U_OO = torch.linalg.eigh(C_OO)
    s_O = e_O.clamp(min=0).sqrt()
    return Decomposition(W_ON, U_OO.flip(1), s_O.flip(0), damping)


def from_root(W_ON: torch.Tensor, A_ON: torch.Tensor, damping: float = 0.0) -> Decomposition:
    """Decompose by the right singular vectors of ``A = W G^½``: cheapest when in < out."""
    e_N, V_NN = torch.linalg.eigh(A_ON.T @ A_ON)
    s_N = e_N.clamp(min=0).sqrt().flip(0)
    floor = s_N[0].clamp(min=torch.finfo(s_N.dtype).tiny) * 1e-12
    U_ON = A_ON @ V_NN.flip(1) / s_N.clamp(min=floor)
    return Decomposition(W_ON, U_ON, s_N, damping)


def from_input_scale(W_ON: torch.Tensor, scale_N: torch.Tensor) -> Decomposition:
    """Decompose by the left singular vectors of ``W diag(d)``: one weight for every input feature.

    ``svd(W diag(d)) = U Σ Vᵀ`` and ``W' = U_k Σ_k V_kᵀ diag(d)⁻¹ = U_k U_kᵀ W``: nothing is divided by a scale.
    """
    A_ON = W_ON * scale_N
    out_features, in_features = W_ON.shape
    return from_output_gram(W_ON, A_ON @ A_ON.T) if out_features <= in_features else from_root(W_ON, A_ON)
