"""Settling the weights of a layer one input after the other, with the later ones making up for what that costs.

With ``H = XᵀX + λI`` and ``U`` the upper factor of its inverse, ``UᵀU = H⁻¹``, inputs are taken from the first to the
last. To change weight j of output i by ``d`` costs ``d² / U_jj²``, with all inputs before it settled. It leaves
``err_ij = d / U_jj`` behind, and ``W_i,j: -= err_ij U_j,j:`` is the best the later weights can do about it: the step of
the optimal brain surgeon (Hassibi and Stork, 1992). What is left of a block goes to all later inputs at once. SparseGPT
(arXiv 2301.00774) settles weights at zero, GPTQ (arXiv 2210.17323) at whole numbers times a scale.

Legend of the shape suffixes: O outputs, N inputs, B the inputs of a block.
"""

import logging
from collections.abc import Callable

import torch

from pared.remembered import once_per_tensor

log = logging.getLogger(__name__)

BLOCK = 128
DAMPING = 0.01  # of the mean diagonal
MORE_DAMPING = (1e-8, 1e-6, 1e-4, 1e-2, 1e-1, 1.0)  # tried in this order, from the first above what was asked
LEAST_PIVOT = 1e-13  # smallest ratio of squared Cholesky pivots of a Gram that counts as full rank

# Of the weights of a block as they are now (out, block), the place in it and the place of its first input: what the
# weights of the input at that place are settled at (out,).
Settle = Callable[[torch.Tensor, int, int], torch.Tensor]


@once_per_tensor
def factorise(gram_NN: torch.Tensor, damping: float, compute: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the factor of the inverse Hessian and which inputs are dead; once for weights that read one input."""
    living_NN, dead_N = _without_dead_inputs(gram_NN.double())
    # Row by row, as the sweep reads it: LAPACK's order of columns makes that take 2.5 times as long.
    return inverse_factor(living_NN, damping).to(compute).contiguous(), dead_N


def inverse_factor(gram_NN: torch.Tensor, damping: float = DAMPING) -> torch.Tensor:
    """Return the upper triangular ``U`` with ``UᵀU = (G + λ·mean(diag G)·I)⁻¹``, float64.

    The papers factor the inverse. Factored from the last input to the first, ``G = R Rᵀ`` with ``R`` upper triangular,
    and ``U = R⁻¹``: the same matrix, and no inverse of ``G`` is formed.

    Args:
        gram_NN: the Gram ``(in, in)``; may be rank-deficient.
        damping: λ; the next of a ladder where the Gram is still not of full rank, which is logged.

    Raises:
        ValueError: the Gram is zero, not finite, or not positive semi-definite.
    """
    gram_NN = gram_NN.double()
    mean = gram_NN.diagonal().mean()
    if not bool(gram_NN.isfinite().all()) or not mean > 0:
        raise ValueError(f"the Gram's diagonal has the mean {float(mean)}; expected a positive number, all finite")
    eye_NN = torch.eye(len(gram_NN), dtype=gram_NN.dtype, device=gram_NN.device)
    for more in (damping, *(step for step in MORE_DAMPING if step > damping)):
        flipped_NN = (gram_NN + more * mean * eye_NN).flip(0, 1)
        L_NN, failed = torch.linalg.cholesky_ex(flipped_NN)
        pivots_N = L_NN.diagonal()
        if not int(failed) and (pivots_N.min() / pivots_N.max()).square() > LEAST_PIVOT:
            if more > damping:
                log.info("Gram of %d features is rank-deficient: relative damping %g", len(gram_NN), more)
            return torch.linalg.solve_triangular(L_NN, eye_NN, upper=False).flip(0, 1)
    raise ValueError(f"the Gram is not positive semi-definite, even with damping {max(damping, MORE_DAMPING[-1])}")


def sweep(W_ON: torch.Tensor, U_NN: torch.Tensor, settle: Settle, block: int = BLOCK) -> torch.Tensor:
    """Return the weight ``(out, in)`` as it was settled, up to the rounding of its dtype.

    Args:
        W_ON: the weight; it stays as it is.
        U_NN: the factor of the inverse Hessian, of its dtype.
        settle: says what the weights of an input become.
        block: inputs that are updated together.
    """
    W_ON = W_ON.clone()
    for start in range(0, W_ON.shape[1], block):
        stop = min(start + block, W_ON.shape[1])
        W_OB, U_BB = W_ON[:, start:stop].clone(), U_NN[start:stop, start:stop]
        errors_OB = torch.zeros_like(W_OB)
        for j in range(stop - start):
            errors_OB[:, j] = (W_OB[:, j] - settle(W_OB, j, start)) / U_BB[j, j]
            W_OB[:, j:].addr_(errors_OB[:, j], U_BB[j, j:], alpha=-1)
        W_ON[:, start:stop] = W_OB
        W_ON[:, stop:] -= errors_OB @ U_NN[start:stop, stop:]
    return W_ON


def _without_dead_inputs(gram_NN: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the Gram per mean of its living diagonal, dead inputs at 1, and which are dead.

    The paper's code puts 1 on the diagonal whatever the Gram's scale is; at the mean they leave the damping alone.
    """
    energy_N = gram_NN.diagonal()
    if bool((energy_N < 0).any()):
        raise ValueError("the Gram is not positive semi-definite: its diagonal has negative numbers")
    dead_N = energy_N == 0
    if bool(gram_NN[dead_N].any()):
        raise ValueError("the Gram is not positive semi-definite: an input without energy has products with others")
    if bool(dead_N.all()):
        log.info("a Gram of %d features is zero: pruned by the weight alone", len(gram_NN))
        return torch.eye(len(gram_NN), dtype=gram_NN.dtype, device=gram_NN.device), ~dead_N
    gram_NN = gram_NN / energy_N[~dead_N].mean()
    gram_NN.diagonal()[dead_N] = 1
    return gram_NN, dead_N
