"""N:M mixtures: how many of every M weights each block loses, so that the whole comes closest to a target."""

import math
from dataclasses import dataclass

import torch

from pared.allocation.dsa.evaluate import validation_errors
from pared.allocation.sparsity_budget import require_sparsity, shares
from pared.errors import ParedError

STATES = 4096  # sums that are told apart at a time; fewer sums than that make the result exact


@dataclass(frozen=True)
class Mixture:
    """Whole numbers for every block.

    Attributes:
        removed: of every ``group`` consecutive weights, how many become zero, by block.
        group: M.
        target: the mean sparsity that was asked for.
        achieved: the mean sparsity of ``removed``.
    """

    removed: tuple[int, ...]
    group: int
    target: float
    achieved: float


def mixture(
    sparsities_L: torch.Tensor, group: int, sparsity: float | None = None, weights: torch.Tensor | None = None
) -> Mixture:
    """Round the sparsities of blocks to whole numbers of every M weights.

    Each block gets the number below or above ``s_l M``, at most M - 1; among all such choices the mean is as close to
    the target as it can be, and among those the numbers are as close to what was wished as they can be. That is exact
    while there are no more than 4096 different sums at a time, as with blocks of a few sizes; with more, sums that lie
    close together count as one (60 blocks of 60 sizes at M = 8: 1.1e-5 from the target).

    Args:
        sparsities_L: in [0, 1), of every block.
        group: M.
        sparsity: the target; the mean of the sparsities if none.
        weights: parameters of the blocks ``(L,)``; every block counts the same if none.

    Raises:
        ParedError: M is below 2, or a sparsity or the target is out of range.
    """
    s_L = sparsities_L.detach().cpu().double()
    share_L = shares(len(s_L), weights)
    mean = float(share_L @ s_L)
    target = mean if sparsity is None else sparsity
    require_sparsity(target)
    if group < 2:
        raise ParedError(f"N:M prunes N of every M weights, M at least 2; got M = {group}")
    if wrong := validation_errors(s_L, mean, weights):
        raise ParedError(wrong[0])
    size_L = torch.ones(len(s_L), dtype=torch.float64) if weights is None else weights.detach().cpu().double()
    wished = (s_L * group).tolist()
    below = [min(math.floor(wish + 1e-9), group - 1) for wish in wished]  # 0.3 · 10 is 3.0000000000000004 or less
    raised = _raised(wished, below, size_L.tolist(), target * group * float(size_L.sum()), group)
    removed = tuple(least + (block in raised) for block, least in enumerate(below))
    return Mixture(removed, group, target, float(share_L @ torch.tensor(removed, dtype=torch.float64)) / group)


def _raised(wished: list[float], below: list[int], sizes: list[float], target: float, group: int) -> frozenset[int]:
    """Return the blocks that get the number above what they wished for."""
    by_size: dict[float, list[int]] = {}
    for block in sorted(range(len(wished)), key=lambda block: below[block] - wished[block]):  # largest remainder first
        if below[block] < group - 1:
            by_size.setdefault(sizes[block], []).append(block)
    # Among blocks of one size only the number of those raised matters to the sum, and the largest remainders go first.
    states: dict[float, tuple[float, tuple[int, ...]]] = {
        sum(n * size for n, size in zip(below, sizes, strict=True)): (0.0, ())
    }
    for size, blocks in by_size.items():
        costs = [0.0]
        for block in blocks:
            remainder = wished[block] - below[block]
            costs.append(costs[-1] + size * ((1 - remainder) ** 2 - remainder**2))
        following: dict[float, tuple[float, tuple[int, ...]]] = {}
        for total, (cost, counts) in states.items():
            for count, more in enumerate(costs):
                key, state = total + count * size, (cost + more, (*counts, count))
                following[key] = min(following.get(key, state), state)
        states = _thinned(following)
    best = min(states, key=lambda total: (abs(total - target), states[total]))
    return frozenset(
        block for count, blocks in zip(states[best][1], by_size.values(), strict=True) for block in blocks[:count]
    )


def _thinned(
    states: dict[float, tuple[float, tuple[int, ...]]],
) -> dict[float, tuple[float, tuple[int, ...]]]:
    """Return the cheapest state of every cell of a grid over the sums, if there are more states than cells."""
    if len(states) <= STATES:
        return states
    low, high = min(states), max(states)
    cells: dict[int, float] = {}
    for total in states:
        cell = int((total - low) / (high - low) * (STATES - 1))
        if cell not in cells or states[total] < states[cells[cell]]:
            cells[cell] = total
    return {total: states[total] for total in cells.values()}
