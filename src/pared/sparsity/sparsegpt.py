"""SparseGPT: prune and let later inputs compensate (Frantar and Alistarh, ICML 2023, arXiv 2301.00774).

With ``H = XᵀX + λI`` and ``U`` the upper factor of its inverse, ``UᵀU = H⁻¹``, inputs are taken from the first to the
last. To let weight j of output i go costs ``W_ij² / U_jj²``, with all inputs before it settled. It leaves
``err_ij = W_ij / U_jj`` behind, and ``W_i,j: -= err_ij U_j,j:`` is the best the later weights can do about it: the step
of the optimal brain surgeon (Hassibi and Stork, 1992). What is left of a block goes to all later inputs at once.

Legend of the shape suffixes: O outputs, N inputs, B the inputs of a block.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from pared.remembered import once_per_tensor
from pared.sparsity import masks
from pared.sparsity.masks import Pruned
from pared.sparsity.pattern import NM, Pattern

log = logging.getLogger(__name__)

BLOCK = 128
DAMPING = 0.01  # of the mean diagonal
MORE_DAMPING = (1e-8, 1e-6, 1e-4, 1e-2, 1e-1, 1.0)  # tried in this order, from the first above what was asked
LEAST_PIVOT = 1e-13  # smallest ratio of squared Cholesky pivots of a Gram that counts as full rank


def prune(
    W_ON: torch.Tensor,
    gram_NN: torch.Tensor,
    pattern: Pattern,
    block: int = BLOCK,
    damping: float = DAMPING,
    compute: torch.dtype = torch.float64,
) -> Pruned:
    """Prune a weight and update what is kept, for the least error of its outputs.

    Weights are compared as they are when their turn comes: over a block of inputs and all outputs, of which
    ``⌊out · block · sparsity⌋`` go, or within a group of N:M.

    Args:
        W_ON: the weight ``(out, in)``, any floating dtype.
        gram_NN: the input Gram ``Σ xᵀx`` ``(in, in)``, any scale; may be rank-deficient. Weights of inputs that were
            always zero become zero, pruned or not. If all of it is zero it says nothing, and the weight alone decides.
        pattern: which zeros.
        block: inputs that are compared, and updated, together; a multiple of M for N:M.
        damping: added to the diagonal, relative to its mean; more where that is not enough, which is logged.
        compute: float32 or float64, for the updates. The factor of the Gram is always float64.

    Raises:
        ValueError: the weight or the Gram is not finite, the Gram is not positive semi-definite or of another width,
            inputs or block do not fit the pattern, or the result leaves the range of the weight's dtype.
    """
    return solve(W_ON, gram_NN, block, damping, compute).realize(pattern)


@dataclass(frozen=True)
class FactorisedHessian:
    """A weight and the factor of its inputs' inverse Hessian, from which every pattern is pruned.

    Attributes:
        W_ON: the weight ``(out, in)``, zero where inputs were always zero.
        U_NN: upper triangular ``(in, in)``, ``UᵀU = H⁻¹``, of the dtype that updates are computed in.
        block: inputs that are compared, and updated, together.
    """

    W_ON: torch.Tensor
    U_NN: torch.Tensor
    block: int = BLOCK

    @property
    def cost(self) -> torch.Tensor:
        """What pruning each entry alone costs, ``W_ij² / U_jj²`` ``(out, in)``: before any other is pruned."""
        return (self.W_ON.to(self.U_NN.dtype) / self.U_NN.diagonal()).square()

    def realize(self, pattern: Pattern) -> Pruned:
        """Prune the weight and update what is kept.

        Raises:
            ValueError: inputs or block do not fit the pattern, or the result leaves the range of the weight's dtype.
        """
        pattern.check(self.W_ON.shape[-1])
        if isinstance(pattern, NM):
            if self.block % pattern.group:
                raise ValueError(
                    f"pattern {pattern} in blocks of {self.block} inputs: expected a multiple of {pattern.group}"
                )
            every, chosen = pattern.group, partial(masks.per_group, pattern=pattern)
        else:
            every, chosen = self.block, partial(masks.per_matrix, pattern=pattern)
        return self.pruned(lambda scores, _: chosen(scores), every)

    def pruned(self, choose: Callable[[torch.Tensor, int], torch.Tensor], every: int) -> Pruned:
        """Prune the weight by masks chosen from scores and the first input whenever ``every`` inputs are done.

        Raises:
            ValueError: the result leaves the range of the weight's dtype.
        """
        new_ON, mask_ON = _sweep(self.W_ON.to(self.U_NN.dtype), self.U_NN, choose, every, self.block)
        if bool(mask_ON.all()):
            return Pruned(self.W_ON, mask_ON)  # bit for bit: an update by zero turns -0.0 into 0.0
        pruned = masks.apply(new_ON.to(self.W_ON.dtype), mask_ON)
        if not bool(pruned.weight.isfinite().all()):
            raise ValueError(f"the updated weight leaves the range of {self.W_ON.dtype}; give the weight in float32")
        return pruned


def solve(
    W_ON: torch.Tensor,
    gram_NN: torch.Tensor,
    block: int = BLOCK,
    damping: float = DAMPING,
    compute: torch.dtype = torch.float64,
) -> FactorisedHessian:
    """Factorise the Hessian of a weight's inputs; the arguments are those of :func:`prune`.

    Raises:
        ValueError: the weight or the Gram is not finite, or the Gram is not positive semi-definite or of another width.
    """
    _check(W_ON, gram_NN, block, damping, compute)
    U_NN, dead_N = _factorise(gram_NN, damping, compute)
    return FactorisedHessian(W_ON.masked_fill(dead_N, 0), U_NN, block)


def update(
    W_ON: torch.Tensor,
    gram_NN: torch.Tensor,
    mask_ON: torch.Tensor,
    block: int = BLOCK,
    damping: float = DAMPING,
    compute: torch.dtype = torch.float64,
) -> Pruned:
    """Make up for a mask that is given, True where a weight is kept; the block then changes nothing but the speed.

    The other arguments are those of :func:`prune`.

    Raises:
        ValueError: as :func:`prune`, or the mask is not boolean or of another shape.
    """
    if mask_ON.dtype != torch.bool or mask_ON.shape != W_ON.shape:
        raise ValueError(f"mask {mask_ON.dtype} {tuple(mask_ON.shape)} for a weight {tuple(W_ON.shape)}: expected "
                         "booleans of its shape")  # fmt: skip

    def given(scores_OB: torch.Tensor, first: int) -> torch.Tensor:
        return mask_ON[:, first : first + scores_OB.shape[1]]

    return solve(W_ON, gram_NN, block, damping, compute).pruned(given, block)


@once_per_tensor
def _factorise(gram_NN: torch.Tensor, damping: float, compute: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the factor of the inverse Hessian and which inputs are dead; once for weights that read one input."""
    living_NN, dead_N = _without_dead_inputs(gram_NN.double())
    # Row by row, as the sweep reads it: LAPACK's order of columns makes that take 2.5 times as long.
    return inverse_factor(living_NN, damping).to(compute).contiguous(), dead_N


def inverse_factor(gram_NN: torch.Tensor, damping: float = DAMPING) -> torch.Tensor:
    """Return the upper triangular ``U`` with ``UᵀU = (G + λ·mean(diag G)·I)⁻¹``, float64.

    The paper factors the inverse. Factored from the last input to the first, ``G = R Rᵀ`` with ``R`` upper triangular,
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


def _sweep(
    W_ON: torch.Tensor,
    U_NN: torch.Tensor,
    choose: Callable[[torch.Tensor, int], torch.Tensor],
    every: int,
    block: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the updated weight and the mask, chosen from scores and the first input whenever ``every`` are done."""
    W_ON, U_N = W_ON.clone(), U_NN.diagonal()
    mask_ON = torch.ones_like(W_ON, dtype=torch.bool)
    for start in range(0, W_ON.shape[1], block):
        stop = min(start + block, W_ON.shape[1])
        W_OB, U_BB = W_ON[:, start:stop].clone(), U_NN[start:stop, start:stop]
        errors_OB = torch.zeros_like(W_OB)
        for j in range(stop - start):
            if j % every == 0:
                chosen = slice(j, min(j + every, stop - start))
                scores_OB = W_OB[:, chosen].abs() / U_N[start:stop][chosen]  # the paper's, squared, has the same order
                mask_ON[:, start:stop][:, chosen] = choose(scores_OB, start + j)
            errors_OB[:, j] = W_OB[:, j].masked_fill(mask_ON[:, start + j], 0) / U_BB[j, j]
            W_OB[:, j:].addr_(errors_OB[:, j], U_BB[j, j:], alpha=-1)
        W_ON[:, start:stop] = W_OB
        W_ON[:, stop:] -= errors_OB @ U_NN[start:stop, stop:]
    return W_ON, mask_ON


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


def _check(W_ON: torch.Tensor, gram_NN: torch.Tensor, block: int, damping: float, compute: torch.dtype) -> None:
    if W_ON.ndim != 2 or gram_NN.shape != (W_ON.shape[1], W_ON.shape[1]):
        raise ValueError(f"Gram of shape {tuple(gram_NN.shape)} for a weight {tuple(W_ON.shape)}: expected (in, in)")
    if not bool(W_ON.isfinite().all()):
        raise ValueError("the weight holds NaN or infinity")
    if not bool(gram_NN.isfinite().all()):
        raise ValueError("the Gram holds NaN or infinity")
    if block < 1:
        raise ValueError(f"blocks of {block} inputs: expected 1 or more")
    if not 0 <= damping < float("inf"):
        raise ValueError(f"damping {damping}: expected a fraction of the mean diagonal, 0 or more")
    if compute not in (torch.float32, torch.float64):
        raise ValueError(f"compute in {compute}: expected float32 or float64")
