"""Whitened SVD: SVD-LLM (Wang et al., ICLR 2025, arXiv 2403.07378), in the cheapest exact form.

The paper takes ``L Lᵀ = G`` and ``W L = U Σ Vᵀ`` and keeps ``W' = U_k Σ_k V_kᵀ L⁻¹``, which minimises
``||X (W - W')ᵀ||_F`` (Theorem 3.2). Since ``Σ_k V_kᵀ = U_kᵀ W L`` this is ``W' = U_k U_kᵀ W``: no inverse is ever
formed, and only ``U`` is needed, from whichever of two symmetric eigenproblems is smaller.
"""

import logging
import math
from collections.abc import Sequence
from dataclasses import replace

import torch

from pared.lowrank import svd
from pared.lowrank.decomposition import Decomposition, at_no_cost, from_output_gram, from_root, squared
from pared.lowrank.sharing import stacked
from pared.remembered import once_per_tensor

log = logging.getLogger(__name__)

DAMPINGS = (0.0, 1e-8, 1e-6, 1e-4, 1e-2)
LEAST_PIVOT = 1e-13  # smallest ratio of squared Cholesky pivots of a Gram that counts as full rank
OUTPUT_DAMPING = 1e-5  # of a rank-deficient output Gram: above the rounding of its float32 products


def decompose(W_ON: torch.Tensor, gram_NN: torch.Tensor) -> Decomposition:
    """Decompose a weight by what its outputs are on the calibration data, from the Gram of its inputs.

    Args:
        W_ON: the weight ``(out, in)``, any floating dtype; computed in float64.
        gram_NN: the input Gram ``Σ xᵀx`` ``(in, in)``, any scale; may be rank-deficient.

    Raises:
        ValueError: the Gram is not finite, or not positive semi-definite.
    """
    return decompose_group([W_ON], gram_NN)


def decompose_group(W_ON: Sequence[torch.Tensor], gram_NN: torch.Tensor, *, losses_only: bool = False) -> Decomposition:
    """Decompose weights that get one basis, stacked, as in :func:`decompose`; or one.

    Args:
        W_ON: the weights ``(out, in)``.
        gram_NN: as for :func:`decompose`, of the inputs of all.
        losses_only: find no directions, in half the time.

    Raises:
        ValueError: as :func:`decompose`.
    """
    members = [weight.double() for weight in W_ON]
    weight_ON = stacked(members)
    if not bool(gram_NN.diagonal().any()):
        return _unseen(weight_ON)
    L_NN, gram_NN, damping = cholesky_factor(gram_NN.double())
    out_features, in_features = weight_ON.shape
    if out_features <= in_features:
        C_OO = weight_ON @ gram_NN @ weight_ON.T
        return from_output_gram(weight_ON, C_OO, damping, losses_only=losses_only)
    M_NN = squared(members[0])
    for member_ON in members[1:]:
        M_NN = M_NN + squared(member_ON)
    return from_root(weight_ON, L_NN, damping, M_NN=M_NN, losses_only=losses_only)


def decompose_by_outputs(
    W_ON: torch.Tensor, output_gram_OO: torch.Tensor, *, losses_only: bool = False
) -> Decomposition:
    """Decompose a weight from the Gram of its outputs, ``C = Σ yᵀy = W G Wᵀ`` (Swift-SVD's statistic).

    The same decomposition as :func:`decompose`, and cheaper to collect where out is smaller than in. A rank-deficient
    ``C`` is damped with a little of ``W Wᵀ``, what inputs of equal energy in every direction would give.

    Args:
        W_ON: the weight ``(out, in)``, any floating dtype; computed in float64.
        output_gram_OO: of the outputs without bias ``(out, out)``, any scale; may be rank-deficient.
        losses_only: find no directions, in half the time.

    Raises:
        ValueError: the Gram is not finite.
    """
    W_ON, C_OO = W_ON.double(), output_gram_OO.double()
    if not bool(C_OO.diagonal().any()):
        return _unseen(W_ON)
    mean = _mean_diagonal(C_OO)
    if _cholesky(C_OO) is not None:
        return from_output_gram(W_ON, C_OO, losses_only=losses_only)
    damping, free_OO = OUTPUT_DAMPING, W_ON @ W_ON.T
    log.info("output Gram of %d features is rank-deficient: relative damping %g", C_OO.shape[0], damping)
    damped_OO = C_OO + damping * mean / _mean_diagonal(free_OO) * free_OO
    return from_output_gram(W_ON, damped_OO, damping, losses_only=losses_only)


def cholesky_factor(
    gram_NN: torch.Tensor, dampings: tuple[float, ...] = DAMPINGS
) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Return ``L`` with ``L Lᵀ = G + λ·mean(diag G)·I``, the damped Gram, and the least λ of a ladder that works.

    A Gram of fewer tokens than features has no information in some directions. Damping gives those directions an
    equal, tiny weight, so that what is free to choose follows the weight itself; more than the first is logged.
    A Gram that several weights are decomposed by, one tensor, is factored once: ``L`` is not to be changed.

    Args:
        gram_NN: the Gram ``(n, n)``, float64.
        dampings: the ladder, rising; the first is what a Gram of full rank gets.

    Raises:
        ValueError: the Gram is zero, not finite, or not positive semi-definite.
    """
    L_NN, damping = _factor(gram_NN, dampings)
    return L_NN, _damped(gram_NN, damping) if damping else gram_NN, damping


@once_per_tensor
def _factor(gram_NN: torch.Tensor, dampings: tuple[float, ...]) -> tuple[torch.Tensor, float]:
    for damping in dampings:
        if (L_NN := _cholesky(_damped(gram_NN, damping))) is not None:
            if damping > dampings[0]:
                log.info("Gram of %d features is rank-deficient: relative damping %g", gram_NN.shape[0], damping)
            return L_NN, damping
    raise ValueError(f"the Gram is not positive semi-definite, even with damping {dampings[-1]}")


def _damped(gram_NN: torch.Tensor, damping: float) -> torch.Tensor:
    damped_NN = gram_NN.clone()
    damped_NN.diagonal().add_(damping * _mean_diagonal(gram_NN))
    return damped_NN


def _unseen(W_ON: torch.Tensor) -> Decomposition:
    """Decompose a weight whose data says nothing (dead inputs, a zero weight): by the weight alone."""
    log.info("a Gram of %d x %d weights is zero: plain SVD", *W_ON.shape)
    why = "its weight is zero" if not bool(W_ON.any()) else "nothing but zeros reach it or leave it on the text"
    return replace(at_no_cost(svd.decompose(W_ON), why), damping=1.0)


def _cholesky(gram_NN: torch.Tensor) -> torch.Tensor | None:
    """Return the Cholesky factor of a Gram of full rank, None for any other."""
    L_NN, failed = torch.linalg.cholesky_ex(gram_NN)
    pivots_N = L_NN.diagonal()
    full_rank = not int(failed) and (pivots_N.min() / pivots_N.max()).square() > LEAST_PIVOT
    return L_NN if full_rank else None


def _mean_diagonal(gram_NN: torch.Tensor) -> float:
    mean = float(gram_NN.diagonal().mean())
    if not (mean > 0 and math.isfinite(mean)):
        raise ValueError(f"the mean of the Gram's diagonal is {mean}; expected a positive number")
    return mean
