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
    ``W G^½`` that is the whitened SVD of SVD-LLM without an inverse; with those of ``W`` it is the plain SVD.

    Attributes:
        W_ON: the weight ``(out, in)``, float64.
        U_OR: the directions, columns, float64.
        singular_values_R: what leaving out direction j costs, falling.
        damping: what was added to the Gram's diagonal, relative to its mean; 0 if nothing.
    """

    W_ON: torch.Tensor
    U_OR: torch.Tensor
    singular_values_R: torch.Tensor
    damping: float = 0.0

    def loss(self, rank: int) -> float:
        """Return ``sqrt(Σ_{j>rank} s_j²)``, the error ``||X (W - W')ᵀ||_F`` the rank leaves."""
        return float(self.singular_values_R[rank:].square().sum().sqrt())

    def factors(self, rank: int) -> Factors:
        """Return the factors of one rank, float64; ``up`` has orthonormal columns."""
        s_R = self.singular_values_R
        U_OK = self.U_OR[:, :rank]
        if s_R[rank - 1] <= WEAK * s_R[0]:
            U_OK = torch.linalg.qr(U_OK).Q  # same span, orthonormal again
        return Factors(down=U_OK.T @ self.W_ON, up=U_OK)


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
