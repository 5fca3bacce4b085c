"""One threshold over the scores of all channels and heads of a model, standardised layer by layer (FLAP, 2312.11983).

Among the inputs of each layer that reads channels ``z_j = (S_j - mean S) / std S``; a head has the mean over its
inputs, as in the released code. The channels with the largest ``z`` stay, wherever they are, as many as the budget has
parameters for.
"""

import heapq
from collections.abc import Iterator, Sequence

import torch

from pared.allocation.rank_budget import split_fixed
from pared.allocation.units import Budget, Channels, Evidence, Unit
from pared.allocation.widths.groups import split_apart
from pared.schema.plan import Decision, Dense

ALL = Dense(reason="all of its channels are above the threshold")


def global_widths(units: Sequence[Unit], budget: Budget, evidence: Evidence, _: object = None) -> dict[str, Decision]:
    """Keep the channels of the largest standardised scores.

    Channels stay in steps of ``multiple_of``, heads one by one: of all steps the one with the largest mean score is
    taken next, those of a group in its own order, until none is affordable. Every group keeps at least one step.

    Args:
        units: what can be decided.
        budget: the fraction to keep, of widths alone.
        evidence: the channel groups and their costs, whose squares are scores.

    Raises:
        ParedError: there are no channel groups, or none of widths small enough.
    """
    if budget.keep == 1:
        return {unit.name: Dense(reason="everything is kept") for unit in units}
    open_units, decisions, left = split_fixed(units, budget)
    groups, apart, left = split_apart(open_units, left, budget, evidence, units)
    widths = _widths(groups, budget, left)
    for one in groups:
        whole = dict.fromkeys((site.name for site in one.group.sites), ALL)
        width = widths[one.group.name]
        decisions |= whole if width == one.group.channels else one.decisions(width)
    decisions |= apart
    return {unit.name: decisions[unit.name] for unit in units}


def _widths(groups: Sequence[Channels], budget: Budget, left: int) -> dict[str, int]:
    """Return how many channels of every group stay, for so many parameters in all."""
    steps = [_steps(one, budget) for one in groups]
    widths = {one.group.name: next(own)[1] for one, own in zip(groups, steps, strict=True)}
    left -= sum(widths[one.group.name] * one.group.parameters_each for one in groups)
    open_: list[tuple[float, int, int]] = []  # the next step of each group: its worth, falling; the group; the width

    def offer(place: int) -> None:
        if (step := next(steps[place], None)) is not None:
            heapq.heappush(open_, (-step[0], place, step[1]))

    for place in range(len(groups)):
        offer(place)
    while open_:
        _, place, width = heapq.heappop(open_)
        group = groups[place].group
        cost = (width - widths[group.name]) * group.parameters_each
        if cost <= left:
            left -= cost
            widths[group.name] = width
            offer(place)
    return widths


def _steps(one: Channels, budget: Budget) -> Iterator[tuple[float, int]]:
    """Yield the widths that a group may have, rising, each with the mean worth of the channels that it adds."""
    worth_G, start = standardised(one), 0
    for width in (*one.widths(budget.multiple_of), one.group.channels):
        yield float(worth_G[start:width].mean()), width
        start = width


def standardised(one: Channels) -> torch.Tensor:
    """Return what every channel is worth beside those of other groups ``(channels,)``, in the order of its group."""
    assert one.cost is not None, "costs are required"
    scores_N = one.cost.double().square()
    spread = scores_N.std() if len(scores_N) > 1 else scores_N.new_zeros(())
    return ((scores_N - scores_N.mean()) / (spread if spread > 0 else 1)).view(-1, one.group.inputs).mean(dim=1)
