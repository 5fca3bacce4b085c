"""What every low-rank method of one weight comes down to: an orthonormal basis of outputs, best directions first.

Legend of the shape suffixes: O outputs, N inputs, R the most directions there can be, K the rank that is kept.
"""

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from pared.lowrank.eigen import eigh
from pared.remembered import once_per_tensor

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
        singular_values_R: what leaving out direction j costs, falling.
        U_OR: the directions, columns, float64; none if ``T_NR`` gives them, or if only losses were asked for.
        T_NR: what makes the directions of the weight, ``U = Lᵀ W T``, float64: smaller where in < out, and only the
            columns that are kept are multiplied out.
        M_NN: with ``T_NR``, ``Wᵀ L Lᵀ W``: makes ``down`` of it without a product as tall as the weight.
        damping: what was added to the Gram's diagonal, relative to its mean; 0 if nothing.
        L_OO: the weighting of outputs: lower triangular ``(out, out)``, a diagonal ``(out,)``, or none.
        weighted_ON: ``Lᵀ W`` in place of a triangular ``L``, which is larger where in < out, with ``T_NR``: all of
            ``W' = W T_k T_kᵀ M`` is known without it.
        fallback: what stands in for statistics that say nothing, for the record; empty if they were what was used.
    """

    W_ON: torch.Tensor
    singular_values_R: torch.Tensor
    U_OR: torch.Tensor | None = None
    T_NR: torch.Tensor | None = None
    M_NN: torch.Tensor | None = None
    damping: float = 0.0
    L_OO: torch.Tensor | None = None
    weighted_ON: torch.Tensor | None = None
    fallback: str = ""

    @property
    def directed(self) -> bool:
        """Whether directions were found, and not losses alone."""
        return self.U_OR is not None or self.T_NR is not None

    def loss(self, rank: int) -> float:
        """Return ``sqrt(Σ_{j>rank} s_j²)``, the (weighted) error ``||X (W - W')ᵀ L||_F`` the rank leaves."""
        return float(self.singular_values_R[rank:].square().sum().sqrt())

    def factors(self, rank: int) -> Factors:
        """Return the factors of one rank, float64; ``up`` has orthonormal columns if outputs are not weighted."""
        if self.weighted_ON is not None:
            T_NK, down_KN = self.projection(rank)
            return Factors(down=down_KN, up=self.W_ON @ T_NK)
        weighted_ON = self.W_ON if self.L_OO is None else weigh_outputs(self.L_OO, self.W_ON)
        if self.T_NR is None:
            assert self.U_OR is not None
            U_OK = self.U_OR[:, :rank]
        else:
            U_OK = weighted_ON @ self.T_NR[:, :rank]
        if self.weak(rank):
            U_OK = torch.linalg.qr(U_OK).Q  # same span, orthonormal again
        if self.T_NR is None or self.M_NN is None or self.weak(rank):
            down_KN = U_OK.T @ weighted_ON
        else:
            down_KN = self.T_NR[:, :rank].T @ self.M_NN
        if self.L_OO is None:
            return Factors(down=down_KN, up=U_OK)
        if self.L_OO.ndim == 1:
            return Factors(down=down_KN, up=U_OK / self.L_OO[:, None])
        return Factors(down=down_KN, up=torch.linalg.solve_triangular(self.L_OO.T, U_OK, upper=True))

    def projection(self, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return ``T (in, rank)`` and ``down (rank, in)`` with ``W' = W T down``, where ``T_NR`` gives the directions.

        Of weak directions only where ``weighted_ON`` is there to make them orthonormal again.
        """
        assert self.T_NR is not None
        T_NK = self.T_NR[:, :rank]
        if self.weighted_ON is None or not (self.M_NN is None or self.weak(rank)):
            assert self.M_NN is not None
            return T_NK, T_NK.T @ self.M_NN
        U_OK = self.weighted_ON @ T_NK
        if self.weak(rank):
            U_OK, R_KK = torch.linalg.qr(U_OK)
            T_NK = torch.linalg.solve_triangular(R_KK, T_NK, upper=True, left=False)
        return T_NK, U_OK.T @ self.weighted_ON

    def weak(self, rank: int) -> bool:
        """Return whether the weakest direction of a rank is too weak to be orthogonal to the others as it is."""
        return bool(self.singular_values_R[rank - 1] <= WEAK * self.singular_values_R[0])


def at_no_cost(found: Decomposition, why: str) -> Decomposition:
    """Return a decomposition whose directions cost nothing to leave out, as the statistics that weight them are zero.

    An allocation that goes by costs then gives the weight the least there is, one rank; its directions are those of the
    decomposition that was given.

    Args:
        found: without the statistics that say nothing.
        why: what they are, for the record.
    """
    costs_R = torch.zeros_like(found.singular_values_R)
    return replace(found, singular_values_R=costs_R, fallback=f"{why}: decomposed without that, at no cost")


def weigh_outputs(L_OO: torch.Tensor, W_ON: torch.Tensor) -> torch.Tensor:
    """Return ``Lᵀ W`` for a lower triangular ``L (out, out)`` or a diagonal ``(out,)``."""
    return L_OO[:, None] * W_ON if L_OO.ndim == 1 else L_OO.T @ W_ON


@once_per_tensor
def squared(W_ON: torch.Tensor) -> torch.Tensor:
    """Return ``Wᵀ W`` ``(in, in)``: once for a weight that is decomposed alone and as one of a group."""
    return W_ON.T @ W_ON


def from_output_gram(
    W_ON: torch.Tensor,
    C_OO: torch.Tensor,
    damping: float = 0.0,
    L_OO: torch.Tensor | None = None,
    *,
    losses_only: bool = False,
) -> Decomposition:
    """Decompose by the eigenvectors of the Gram of the (weighted) outputs, ``Lᵀ W G Wᵀ L``: cheapest when out ≤ in.

    With ``losses_only`` by its eigenvalues alone: what is found has no directions, in half the time.
    """
    if losses_only:
        s_O = torch.linalg.eigvalsh(C_OO).clamp(min=0).sqrt()
        return Decomposition(W_ON, s_O.flip(0), damping=damping, L_OO=L_OO)
    e_O, U_OO = eigh(C_OO)
    s_O = e_O.clamp(min=0).sqrt()
    return Decomposition(W_ON, s_O.flip(0), U_OR=U_OO.flip(1), damping=damping, L_OO=L_OO)


def from_root(
    W_ON: torch.Tensor,
    R_NN: torch.Tensor,
    damping: float = 0.0,
    L_OO: torch.Tensor | None = None,
    weighted_ON: torch.Tensor | None = None,
    M_NN: torch.Tensor | None = None,
    *,
    losses_only: bool = False,
) -> Decomposition:
    """Decompose by the right singular vectors of ``Lᵀ W R`` with ``R Rᵀ = G``: cheapest when in < out.

    ``R`` is a matrix, or a diagonal ``(in,)``. Neither ``W R`` nor ``U`` is multiplied out: both are as tall as the
    weight, and the eigenproblem is as wide. Outputs are weighted by a diagonal ``L (out,)``, or by a triangular one of
    which ``weighted_ON``, ``Lᵀ W``, is all that is needed. ``M_NN`` is ``Wᵀ L Lᵀ W`` where that is known already. With
    ``losses_only`` what is found has no directions, in half the time.
    """
    if M_NN is None:
        A_ON = weighted_ON
        if A_ON is None:
            A_ON = W_ON if L_OO is None else weigh_outputs(L_OO, W_ON)
        M_NN = A_ON.T @ A_ON
        del A_ON
    diagonal = R_NN.ndim == 1
    C_NN = R_NN[:, None] * M_NN * R_NN if diagonal else R_NN.T @ M_NN @ R_NN
    if losses_only:
        s_N = torch.linalg.eigvalsh(C_NN).clamp(min=0).sqrt().flip(0)
        return Decomposition(W_ON, s_N, M_NN=M_NN, damping=damping, L_OO=L_OO, weighted_ON=weighted_ON)
    e_N, V_NN = torch.linalg.eigh(C_NN)
    s_N, V_NN = e_N.clamp(min=0).sqrt().flip(0), V_NN.flip(1)
    divisor_N = s_N.clamp(min=1e-12 * s_N[0])
    divisor_N = divisor_N.masked_fill(divisor_N == 0, torch.inf)  # a zero weight has no directions
    T_NN = (R_NN[:, None] * V_NN if diagonal else R_NN @ V_NN) / divisor_N
    return Decomposition(W_ON, s_N, T_NR=T_NN, M_NN=M_NN, damping=damping, L_OO=L_OO, weighted_ON=weighted_ON)


def from_input_scale(W_ON: torch.Tensor, scale_N: torch.Tensor) -> Decomposition:
    """Decompose by the left singular vectors of ``W diag(d)``: one weight for every input feature.

    ``svd(W diag(d)) = U Σ Vᵀ`` and ``W' = U_k Σ_k V_kᵀ diag(d)⁻¹ = U_k U_kᵀ W``: nothing is divided by a scale.
    """
    out_features, in_features = W_ON.shape
    if out_features > in_features:
        return from_root(W_ON, scale_N)
    A_ON = W_ON * scale_N
    return from_output_gram(W_ON, A_ON @ A_ON.T)
