"""SparseGPT: prune and let later inputs compensate (Frantar and Alistarh, ICML 2023, arXiv 2301.00774).

Weights are settled from the first input to the last, each at itself or at zero (:mod:`pared.error_feedback`). To let
weight j of output i go costs ``W_ij² / U_jj²``, with all inputs before it settled and ``U`` the factor of the inverse
Hessian.

Legend of the shape suffixes: O outputs, N inputs, B the inputs of a block.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from pared.error_feedback import BLOCK, DAMPING, factorise, sweep
from pared.sparsity import masks
from pared.sparsity.masks import Pruned
from pared.sparsity.pattern import NM, Pattern


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
    U_NN, dead_N = factorise(gram_NN, damping, compute)
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


def _sweep(
    W_ON: torch.Tensor,
    U_NN: torch.Tensor,
    choose: Callable[[torch.Tensor, int], torch.Tensor],
    every: int,
    block: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the updated weight and the mask, chosen from scores and the first input whenever ``every`` are done."""
    U_N, mask_ON = U_NN.diagonal(), torch.ones_like(W_ON, dtype=torch.bool)

    def settle(W_OB: torch.Tensor, j: int, start: int) -> torch.Tensor:
        if j % every == 0:
            chosen = slice(j, min(j + every, W_OB.shape[1]))
            # The paper's scores, squared, have the same order.
            scores_OB = W_OB[:, chosen].abs() / U_N[start : start + W_OB.shape[1]][chosen]
            mask_ON[:, start : start + W_OB.shape[1]][:, chosen] = choose(scores_OB, start + j)
        return W_OB[:, j].masked_fill(~mask_ON[:, start + j], 0)

    return sweep(W_ON, U_NN, settle, block), mask_ON


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
