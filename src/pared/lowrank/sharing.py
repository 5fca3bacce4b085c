"""One basis for several weights: Basis Sharing (J. Wang et al., ICLR 2025, arXiv 2410.03765).

The paper writes ``W (in, out)`` and puts the weights of a group side by side, ``W_g = [W^(1) | ... | W^(n)]``, with the
Gram of the group ``G_g = Σ_l X_lᵀX_l``, and keeps ``W_g ≈ B C`` from the whitened SVD of ``W_g``. In torch's
``(out, in)`` the weights are stacked, ``W (n · out, in)``; the basis is ``down (rank, in)``, shared, and the rows of
``up`` are every member's own coefficients. So a group is decomposed like one tall weight, by the same function.

Legend of the shape suffixes: O outputs, N inputs, K the rank; lists have one entry a member of the group.
"""

from collections.abc import Mapping, Sequence

import torch

from pared.lowrank.decomposition import Decomposition, Factors, squared, weigh_outputs
from pared.remembered import once_per_tensor

REFIT_DAMPING = 1e-6  # of the mean diagonal


def stacked(W_ON: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the weights of a group as one, ``(Σ out, in)``; one as it is.

    Raises:
        ValueError: they do not read inputs of one width.
    """
    if len({weight.shape[1] for weight in W_ON}) != 1:
        raise ValueError(f"weights of widths {[weight.shape[1] for weight in W_ON]} cannot share a basis")
    return torch.cat(list(W_ON)) if len(W_ON) > 1 else W_ON[0]


def pooled(statistics: Sequence[Mapping[str, torch.Tensor]], name: str) -> torch.Tensor:
    """Return the mean of a statistic over the members: the paper's sum but for a factor, in the unit of one member."""
    return _mean(*(member[name] for member in statistics))


@once_per_tensor
def _mean(*values: torch.Tensor) -> torch.Tensor:
    return torch.stack(values).mean(dim=0)


def split(factors: Factors, rows: Sequence[int]) -> list[Factors]:
    """Return every member's factors: the same ``down``, its own rows of ``up``."""
    return [Factors(factors.down, up_OK) for up_OK in torch.split(factors.up, list(rows))]


def error(W_ON: torch.Tensor, factors: Factors, gram_NN: torch.Tensor, L_OO: torch.Tensor | None = None) -> float:
    """Return the squared error ``||X (W - up down)ᵀ L||²`` of one weight on its own inputs.

    Args:
        W_ON: the weight ``(out, in)``.
        factors: what stands in for it.
        gram_NN: ``XᵀX`` of its own inputs, not those of the group.
        L_OO: weighting of its outputs, lower triangular ``(out, out)`` or a diagonal ``(out,)``, or none.
    """
    D_ON = W_ON.double() - factors.up.double() @ factors.down.double()
    if L_OO is not None:
        D_ON = weigh_outputs(L_OO, D_ON)
    return float(((D_ON @ gram_NN.double()) * D_ON).sum())


def errors(
    group: Decomposition, rank: int, members: Sequence[Decomposition], grams: Sequence[torch.Tensor]
) -> tuple[float, ...]:
    """Return every member's :func:`error` with the basis of the group.

    Where directions are told by ``U = Lᵀ W T``, ``W' = W P`` with ``P = T_k T_kᵀ M`` for every member alike, and the
    error ``tr(M_m (I - P) G_m (I - P)ᵀ)`` with the member's own ``M_m = Wᵀ L Lᵀ W`` takes no product as tall as a
    weight.

    Args:
        group: of the stacked weights.
        rank: of the shared basis.
        members: of every weight of the group alone, weighted as the group is; without directions is enough.
        grams: ``XᵀX`` of every member's own inputs.
    """
    weak = group.M_NN is None or group.weak(rank)
    if group.T_NR is None or (weak and group.weighted_ON is None):
        return _explicit_errors(group, rank, members, grams)
    T_NK, down_KN = group.projection(rank)
    left_NN = torch.eye(len(T_NK), dtype=T_NK.dtype, device=T_NK.device) - T_NK @ down_KN
    return tuple(
        float((_outer(own) @ left_NN @ gram.to(left_NN) * left_NN).sum())
        for own, gram in zip(members, grams, strict=True)
    )


def _outer(own: Decomposition) -> torch.Tensor:
    """Return ``Wᵀ L Lᵀ W`` ``(in, in)``."""
    if own.M_NN is not None:
        return own.M_NN
    weighted_ON = own.weighted_ON
    if weighted_ON is None:
        weighted_ON = own.W_ON if own.L_OO is None else weigh_outputs(own.L_OO, own.W_ON)
    return squared(weighted_ON)


def _explicit_errors(
    group: Decomposition, rank: int, members: Sequence[Decomposition], grams: Sequence[torch.Tensor]
) -> tuple[float, ...]:
    rows = [len(own.W_ON) for own in members]
    return tuple(
        error(own.W_ON, factors, gram, own.L_OO)
        for own, factors, gram in zip(members, split(group.factors(rank), rows), grams, strict=True)
    )


def block_diagonal(blocks: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return square matrices along the diagonal of one, zero elsewhere."""
    size = sum(len(block) for block in blocks)
    whole, start = blocks[0].new_zeros(size, size), 0
    for block in blocks:
        stop = start + len(block)
        whole[start:stop, start:stop] = block
        start = stop
    return whole


def refit(W_ON: torch.Tensor, factors: Factors, gram_NN: torch.Tensor, cross_NN: torch.Tensor) -> torch.Tensor:
    """Return ``up (out, rank)`` with the least error on the inputs that the compressed model really has.

    Least squares with the basis fixed, ``min ||X' W'ᵀ - T||`` with targets ``T = X Wᵀ``:
    ``up = W C downᵀ (down G' downᵀ)⁻¹`` with ``G' = X'ᵀX'`` and ``C = XᵀX'``. With ``X = X'`` this is the coefficient
    update of Basis Sharing (section 3.3) and of SVD-LLM (section 3.4). It weighs outputs one by one, so that no
    weighting of them changes it.

    Args:
        W_ON: the dense weight ``(out, in)``.
        factors: ``down``, which stays, and ``up``, which is returned where nothing is better.
        gram_NN: ``G'`` ``(in, in)``, any scale; may be rank-deficient.
        cross_NN: ``C`` ``(in, in)``, of the same scale.
    """
    W_ON, down_KN, up_OK = W_ON.double(), factors.down.double(), factors.up.double()
    gram_KK = down_KN @ gram_NN.double() @ down_KN.T
    targets_OK = W_ON @ cross_NN.double() @ down_KN.T
    # Solved for the change, with a little damping: directions that no input reaches keep their coefficients.
    damped_KK = gram_KK.clone()
    damped_KK.diagonal().add_(REFIT_DAMPING * gram_KK.diagonal().mean().clamp(min=torch.finfo(torch.float64).tiny))
    new_OK = up_OK + torch.linalg.solve(damped_KK, targets_OK - up_OK @ gram_KK, left=False)
    before, after = (((one @ gram_KK - 2 * targets_OK) * one).sum() for one in (up_OK, new_OK))
    return new_OK if after < before else up_OK
