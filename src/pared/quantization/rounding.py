"""Weights as whole numbers times a scale: to the nearest, or by what the inputs make of the errors.

With the Gram of the inputs weights are rounded one input after the other, and the later ones make up for the error of
those before (GPTQ, arXiv 2210.17323; :mod:`pared.error_feedback`). Outputs are independent of each other, so each takes
the rounding that is better of the two, and none is worse than to the nearest.

A scale is the best of a few for the squared errors of its group, each weighted by what an error of that input costs.
Those of int4 may be negative: of its whole numbers, -8 to 7, the far end then serves the sign of the largest weight.

Legend of the shape suffixes: O outputs, N inputs, G groups of inputs, M inputs of a group, B the inputs of a block.
"""

import math
from typing import NamedTuple

import torch

from pared.error_feedback import BLOCK, DAMPING, factorise, sweep
from pared.modules.quantized import LEAST, MOST, dequantized

# Scales that are tried, relative to the one at which the largest weight of the group is the last whole number.
SHRINKS = {8: (1.0,), 4: (1.15, 1.07, 1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65)}
FAR = {8: MOST[8], 4: LEAST[4]}  # the whole number that the largest weight becomes


class Grid(NamedTuple):
    """Of which numbers weights may be.

    Attributes:
        bits: of a whole number, 8 or 4.
        group: consecutive inputs with one scale; 0 for all of an output.
        dtype: of the scales.
    """

    bits: int
    group: int
    dtype: torch.dtype


class Rounded(NamedTuple):
    """A weight in few bits.

    Attributes:
        integers_ON: int8 ``(out, in)``.
        scales_OG: ``(out, groups)``, of the dtype of the grid.
        group: consecutive inputs with one scale; 0 for all of an output.
    """

    integers_ON: torch.Tensor
    scales_OG: torch.Tensor
    group: int

    def weight(self) -> torch.Tensor:
        """Return the weight ``(out, in)`` that is computed with, in the dtype of the scales."""
        return dequantized(self.integers_ON, self.scales_OG, self.group)


def rounded(
    W_ON: torch.Tensor, grid: Grid, gram_NN: torch.Tensor | None = None, *, damping: float = DAMPING
) -> Rounded:
    """Round a weight.

    Args:
        W_ON: the weight ``(out, in)``, any floating dtype; computed in float32.
        grid: of which numbers it may be.
        gram_NN: the Gram of the inputs ``(in, in)``, any scale, may be rank-deficient; none rounds to the nearest.
        damping: as of :func:`pared.sparsity.sparsegpt.prune`.

    Raises:
        ValueError: the weight is not finite or a scale leaves its dtype, or the Gram is of another width, not finite or
            not positive semi-definite.
    """
    if not bool(W_ON.isfinite().all()):
        raise ValueError("the weight holds NaN or infinity")
    W_ON = W_ON.float()
    if gram_NN is None or not bool(gram_NN.diagonal().any()):
        return _checked(nearest(W_ON, grid))
    if gram_NN.shape != (W_ON.shape[1], W_ON.shape[1]):
        raise ValueError(f"Gram of shape {tuple(gram_NN.shape)} for a weight {tuple(W_ON.shape)}: expected (in, in)")
    near = nearest(W_ON, grid, gram_NN.diagonal().float())
    fed_back = _with_feedback(W_ON, grid, gram_NN, damping)
    better_O1 = (errors(fed_back.weight(), W_ON, gram_NN) < errors(near.weight(), W_ON, gram_NN)).unsqueeze(1)
    return _checked(
        Rounded(
            torch.where(better_O1, fed_back.integers_ON, near.integers_ON),
            torch.where(better_O1, fed_back.scales_OG, near.scales_OG),
            grid.group,
        )
    )


def nearest(W_ON: torch.Tensor, grid: Grid, cost_N: torch.Tensor | None = None) -> Rounded:
    """Round every weight to the nearest number.

    Args:
        W_ON: the weight, float32.
        grid: of which numbers it may be.
        cost_N: what the squared error of an input's weights costs, by which scales are chosen; all alike if none.
    """
    width = W_ON.shape[1]
    cost_N = W_ON.new_ones(width) if cost_N is None else cost_N
    scales_OG = _scales(_in_groups(W_ON, grid), _in_groups(cost_N.unsqueeze(0), grid), grid)
    return Rounded(_integers(W_ON, spread(scales_OG, grid.group, width), grid), scales_OG, grid.group)


def errors(new_ON: torch.Tensor, W_ON: torch.Tensor, gram_NN: torch.Tensor) -> torch.Tensor:
    """Return the squared error of every output in the norm of the Gram, ``E G Eᵀ`` on its diagonal, float64."""
    E_ON = new_ON.double() - W_ON.double()
    return (E_ON @ gram_NN.double() * E_ON).sum(1)


def spread(scales_OG: torch.Tensor, group: int, width: int) -> torch.Tensor:
    """Return the scale of every weight ``(out, in)``."""
    if not group:
        return scales_OG.expand(-1, width)
    return scales_OG.repeat_interleave(group, dim=1)[:, :width]


def _with_feedback(W_ON: torch.Tensor, grid: Grid, gram_NN: torch.Tensor, damping: float) -> Rounded:
    """Round input after input, the later ones making up for the errors of those before."""
    U_NN, dead_N = factorise(gram_NN, damping, torch.float32)
    W_ON, width = W_ON.masked_fill(dead_N, 0), W_ON.shape[1]
    cost_N = U_NN.diagonal().reciprocal().square()
    group = grid.group or width
    scales_OG = _scales(_in_groups(W_ON, grid), _in_groups(cost_N.unsqueeze(0), grid), grid)
    integers_ON = torch.zeros_like(W_ON, dtype=torch.int8)

    def settle(W_OB: torch.Tensor, j: int, start: int) -> torch.Tensor:
        place = start + j
        if grid.group and place % group == 0:  # of the weights as they are now
            there = slice(j, min(j + group, W_OB.shape[1]))
            cost_1M = cost_N[place : place + W_OB[:, there].shape[1]].unsqueeze(0)
            scales_OG[:, place // group] = _scales(W_OB[:, None, there], cost_1M.unsqueeze(1), grid).squeeze(1)
        scale_O = scales_OG[:, place // group]
        integers_ON[:, place] = _integers(W_OB[:, j : j + 1], scale_O.unsqueeze(1), grid).squeeze(1)
        return integers_ON[:, place].float() * scale_O.float()

    block = BLOCK if not grid.group else max(BLOCK // group, 1) * group
    sweep(W_ON, U_NN, settle, block)
    return Rounded(integers_ON, scales_OG, grid.group)


def _in_groups(W_ON: torch.Tensor, grid: Grid) -> torch.Tensor:
    """Return weights by groups ``(out, groups, inputs)``, the last one filled with zeros."""
    group = grid.group or W_ON.shape[1]
    return torch.nn.functional.pad(W_ON, (0, -W_ON.shape[1] % group)).reshape(len(W_ON), -1, group)


def _scales(W_OGM: torch.Tensor, cost_1GM: torch.Tensor, grid: Grid) -> torch.Tensor:
    """Return the best scale of every group ``(out, groups)``; 1 for one of zeros."""
    place_OG1 = W_OGM.abs().argmax(dim=2, keepdim=True)
    largest_OG = W_OGM.gather(2, place_OG1).squeeze(2)
    # A scale of int8 is positive, as its whole numbers reach as far on either side.
    whole_OG = (largest_OG.abs() if grid.bits == 8 else largest_OG) / FAR[grid.bits]
    best_OG = torch.full_like(whole_OG, math.inf)
    chosen_OG = torch.where(whole_OG == 0, 1, whole_OG).to(grid.dtype)
    for shrink in SHRINKS[grid.bits]:
        scales_OG = (whole_OG * shrink).to(grid.dtype)
        # A scale below the smallest number of its dtype is none: all of the group is zero then.
        scales_OG = torch.where(scales_OG == 0, torch.ones_like(scales_OG), scales_OG)
        numbers_OGM = _integers(W_OGM, scales_OG.unsqueeze(2), grid).to(grid.dtype) * scales_OG.unsqueeze(2)
        loss_OG = ((numbers_OGM.float() - W_OGM).square() * cost_1GM).sum(2)
        better_OG = loss_OG < best_OG
        best_OG = torch.where(better_OG, loss_OG, best_OG)
        chosen_OG = torch.where(better_OG, scales_OG, chosen_OG)
    return chosen_OG


def _integers(W: torch.Tensor, scales: torch.Tensor, grid: Grid) -> torch.Tensor:
    """Return the nearest whole numbers of the grid, int8."""
    return (W / scales.float()).round_().clamp_(LEAST[grid.bits], MOST[grid.bits]).to(torch.int8)


def _checked(found: Rounded) -> Rounded:
    if not bool(found.scales_OG.isfinite().all()):
        raise ValueError(f"a scale leaves the range of {found.scales_OG.dtype}; the weight is too large")
    return found
