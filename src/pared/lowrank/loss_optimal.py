"""Loss-optimal low rank: weighted on both sides by the loss.

For a linear layer ``y = x Wᵀ`` the second-order, Kronecker-factored (K-FAC, Martens and Grosse 2015) estimate of what
a change ``D = W' - W`` costs is ``½ tr(B D A Dᵀ)`` nats a token, ``A = E[xᵀx]`` the Gram of the inputs and
``B = E[gᵀg]`` that of the gradients of the loss at the outputs. With ``B = L Lᵀ`` and ``Lᵀ W A^½ = U Σ Vᵀ`` the best
weight of rank k is ``W' = L⁻ᵀ U_k U_kᵀ Lᵀ W``, and it costs ``½ Σ_{j>k} s_j²``: the same unit for every layer of a
model, so that one global budget decides all ranks. ``B = I`` is SVD-LLM, ``A = B = I`` the plain SVD.

The decomposition is published: GFWSVD (arXiv 2505.17974), OBD-LLM (arXiv 2604.00821), IO-SVD (arXiv 2605.15626, another
output factor) and KFAC-SVD with LEMS (ICML 2026). New is how its costs are used: one exact budget in nats over
ranks, dense weights and shared bases (:mod:`pared.allocation.ranks.loss`), with PIFA's pivots counted in it, and
two-sided targets behind the compressed prefix.
"""

import logging
from collections.abc import Sequence
from dataclasses import replace

import torch

from pared.lowrank.decomposition import Decomposition, at_no_cost, from_output_gram, from_root, weigh_outputs
from pared.lowrank.in_place import weighted_by_root
from pared.lowrank.sharing import block_diagonal
from pared.lowrank.whitening import LEAST_PIVOT, cholesky_factor

log = logging.getLogger(__name__)

DAMPING = 1e-4  # of the mean diagonal, on both sides
# A Gram of few directions (the gradients of a classifier's head) is indefinite by the rounding of its float32 products.
MORE_DAMPING = (1e-3, 1e-2, 1e-1)


def decompose(
    W_ON: torch.Tensor,
    gram_NN: torch.Tensor,
    gradient: torch.Tensor,
    *,
    damp_inputs: bool = True,
    damp_outputs: bool = True,
) -> Decomposition:
    """Decompose a weight, weighted by its inputs and by the gradient of the loss.

    Args:
        W_ON: the weight ``(out, in)``, any floating dtype; computed in float64.
        gram_NN: ``A``, the input Gram per token ``(in, in)``. If it is zero, inputs are not weighted and nothing costs.
        gradient: ``B`` per token: the full Gram of the output gradients ``(out, out)``, its diagonal ``(out,)``, or one
            number, the mean of the diagonal, which leaves the factors at SVD-LLM's and makes the losses comparable. If
            it is zero, outputs are not weighted and nothing costs.
        damp_inputs: add 1e-4 of its mean diagonal to ``A``; what :mod:`~pared.lowrank.shrinkage` has shrunk is of full
            rank, and only damped where rounding made it indefinite.
        damp_outputs: the same of ``B``.

    Raises:
        ValueError: a statistic is not finite, or negative.
    """
    return decompose_group([W_ON], gram_NN, [gradient], damp_inputs=damp_inputs, damp_outputs=damp_outputs)


def decompose_group(
    W_ON: Sequence[torch.Tensor],
    gram_NN: torch.Tensor,
    gradients: Sequence[torch.Tensor],
    *,
    damp_inputs: bool = True,
    damp_outputs: bool = True,
) -> Decomposition:
    """Decompose weights that get one basis, stacked, weighted as in :func:`decompose`.

    A member that no gradient reaches is weighted by next to nothing, 1e-4 of what the others are on average.

    Args:
        W_ON: the weights ``(out, in)``.
        gram_NN: ``A``, as for :func:`decompose`, of the inputs of all.
        gradients: ``B`` of each, as for :func:`decompose`.
        damp_inputs: as for :func:`decompose`.
        damp_outputs: as for :func:`decompose`.

    Raises:
        ValueError: as :func:`decompose`.
    """
    energies = [_mean_energy(gradient) for gradient in gradients]
    nonzero = [energy for energy in energies if energy]
    placeholder = DAMPING * sum(nonzero) / len(nonzero) if nonzero else 1.0
    weighting = [
        gradient if energy else gradient.new_full((), placeholder)
        for gradient, energy in zip(gradients, energies, strict=True)
    ]
    weight_ON = torch.cat(list(W_ON)).double() if len(W_ON) > 1 else W_ON[0].double()
    read = bool(gram_NN.diagonal().any())
    seen_NN = gram_NN if read else torch.eye(len(gram_NN), dtype=gram_NN.dtype, device=gram_NN.device)
    if weight_ON.shape[0] > weight_ON.shape[1] and any(one.ndim == 2 for one in weighting):
        rows = [len(weight) for weight in W_ON]
        found = _decompose_tall(weight_ON, rows, seen_NN, weighting, damp_inputs, damp_outputs)
    else:
        roots = [root(one, len(weight), damp_outputs) for one, weight in zip(weighting, W_ON, strict=True)]
        found = decompose_weighted(weight_ON, seen_NN, _together([one for one, _ in roots]), damp_inputs)
        found = replace(found, damping=max(found.damping, *(used for _, used in roots)))
    if read and nonzero:
        return found
    return at_no_cost(found, "no gradient of the loss reaches it" if read else "nothing but zeros reach it on the text")


def _decompose_tall(
    W_ON: torch.Tensor,
    rows: Sequence[int],
    gram_NN: torch.Tensor,
    gradients: Sequence[torch.Tensor],
    damp_inputs: bool,
    damp_outputs: bool,
) -> Decomposition:
    """Decompose weights one above the other, more outputs than inputs, without a root of ``B`` in memory.

    Raises:
        ValueError: as :func:`decompose`.
    """
    weighted_ON, dampings = torch.empty_like(W_ON), [0.0]
    for own_ON, out_ON, gradient in zip(
        torch.split(W_ON, list(rows)), torch.split(weighted_ON, list(rows)), gradients, strict=True
    ):
        if gradient.ndim == 2:
            of_own, used = _weighted(gradient.double(), own_ON, damp_outputs)
        else:
            L_O, used = root(gradient, len(own_ON), damp_outputs)
            of_own = weigh_outputs(L_O, own_ON)
        out_ON.copy_(of_own)
        dampings.append(used)
    R_NN, used = _factor(gram_NN.double(), "input Gram", damp_inputs)
    return from_root(W_ON, R_NN, max(used, *dampings), weighted_ON=weighted_ON)


def _weighted(gram_OO: torch.Tensor, W_ON: torch.Tensor, damp: bool) -> tuple[torch.Tensor, float]:
    """Return ``Lᵀ W`` with the root ``L`` of a damped Gram, and the damping where it is more than the usual, else 0."""
    _mean(gram_OO.diagonal(), "output gradient Gram")
    found = weighted_by_root(gram_OO, W_ON, ladder(damp), LEAST_PIVOT)
    if found is None:
        raise ValueError(f"the Gram is not positive semi-definite, even with damping {MORE_DAMPING[-1]}")
    weighted_ON, damping = found
    if damping > DAMPING:
        log.info("Gram of %d features is rank-deficient: relative damping %g", len(gram_OO), damping)
    return weighted_ON, damping if damping > DAMPING else 0.0


def _together(roots: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the roots of weights one above the other as one: a diagonal if all are."""
    if all(one.ndim == 1 for one in roots):
        return torch.cat(list(roots))
    return _block_diagonal([one if one.ndim == 2 else one.diag() for one in roots])


def decompose_weighted(
    W_ON: torch.Tensor, gram_NN: torch.Tensor, L_OO: torch.Tensor, damp: bool = True
) -> Decomposition:
    """Decompose a weight from a root of ``B``, as :func:`root` gives it.

    Raises:
        ValueError: the input Gram is not finite, negative, or all zero.
    """
    W_ON, gram_NN = W_ON.double(), gram_NN.double()
    if W_ON.shape[0] > W_ON.shape[1]:
        R_NN, damping = _factor(gram_NN, "input Gram", damp)
        if L_OO.ndim == 1:
            return from_root(W_ON, R_NN, damping, L_OO=L_OO)
        return from_root(W_ON, R_NN, damping, weighted_ON=weigh_outputs(L_OO, W_ON))
    weighted_ON, mean = weigh_outputs(L_OO, W_ON), _mean(gram_NN.diagonal(), "input Gram")
    # Lᵀ W (A + λ I), without a copy of A, which is the largest thing here.
    seen_ON = weighted_ON @ gram_NN
    if damp:
        seen_ON.add_(weighted_ON, alpha=DAMPING * mean)
    return from_output_gram(W_ON, seen_ON @ weighted_ON.T, L_OO=L_OO)


def root(gradient: torch.Tensor, out_features: int, damp: bool = True) -> tuple[torch.Tensor, float]:
    """Return ``L`` with ``L Lᵀ = B``, damped, float64, and the damping where it is more than the usual.

    ``L`` is a diagonal ``(out,)`` unless ``B`` is full.
    """
    if gradient.ndim == 2:
        return _factor(gradient.double(), "output gradient Gram", damp)
    energy_O = gradient.double().expand(out_features)
    mean = _mean(energy_O, "output gradient energy")
    return (energy_O + (DAMPING if damp else 0.0) * mean).sqrt(), 0.0


def _mean_energy(gradient: torch.Tensor) -> float:
    """Return the mean energy of gradients, 0 only if all are zero; what is not finite or negative is for the root."""
    return float((gradient.diagonal() if gradient.ndim == 2 else gradient).mean())


def _block_diagonal(blocks: Sequence[torch.Tensor]) -> torch.Tensor:
    return blocks[0] if len(blocks) == 1 else block_diagonal(blocks)


def ladder(damp: bool) -> tuple[float, ...]:
    """Return the dampings of a Gram that are tried, relative to its mean diagonal, rising."""
    return (DAMPING, *MORE_DAMPING) if damp else (0.0, DAMPING, *MORE_DAMPING)


def _factor(gram_NN: torch.Tensor, what: str, damp: bool) -> tuple[torch.Tensor, float]:
    """Return the Cholesky factor of a damped Gram, and its damping where that is more than the usual, else 0."""
    _mean(gram_NN.diagonal(), what)
    L_NN, _, damping = cholesky_factor(gram_NN, ladder(damp))
    return L_NN, damping if damping > DAMPING else 0.0


def _mean(diagonal_N: torch.Tensor, what: str) -> float:
    mean = float(diagonal_N.mean())
    if not (0 < mean < float("inf")):
        raise ValueError(f"the mean of the {what} is {mean}; expected a positive number")
    return mean
