"""Uniform allocation: every unit keeps the same fraction of its parameters."""

import math
from collections.abc import Sequence

from pared.allocation.rank_budget import split_fixed
from pared.allocation.units import Budget, Channels, Evidence, Unit
from pared.allocation.widths.groups import split_apart
from pared.errors import ParedError
from pared.schema.plan import Decision, Dense

ALL_HEADS = Dense(reason="a whole number of heads is nearest to its share")


def uniform(units: Sequence[Unit], budget: Budget, evidence: Evidence, __: object = None) -> dict[str, Decision]:
    """Give every unit the largest rank whose storage fits the fraction that is kept, or channel groups a width.

    A unit that cannot be factorised into fewer parameters stays dense, and the others give up what it costs; if they
    cannot, the plan's ``shortfall`` tells. Where widths may be decided every channel group keeps one fraction of its
    channels, rounded down; where only they may, all that is in no group stays dense. Of heads there are few: they are
    rounded to the nearest number first, and the others keep one fraction of what that leaves.

    Args:
        units: what can be decided.
        budget: the fraction to keep, and what a rank costs.
        evidence: the channel groups.

    Raises:
        ParedError: a unit would be left without a single rank, or a group without channels.
    """
    if budget.keep == 1:
        return {unit.name: Dense(reason="everything is kept") for unit in units}
    open_units, decisions, left = split_fixed(units, budget)
    groups, apart, left = split_apart(open_units, left, budget, evidence, units)
    decisions |= apart
    open_units = [unit for unit in open_units if unit.name not in apart]
    inside = {site.name for one in groups for site in one.group.sites}
    total = sum(unit.parameters for unit in open_units)
    share = left / total if decisions and open_units else budget.keep
    heads = [one for one in groups if one.group.unit == "head"]
    for one in heads:
        count = max(1, math.floor(share * one.group.channels + 0.5))
        whole = dict.fromkeys((site.name for site in one.group.sites), ALL_HEADS)
        decisions |= one.decisions(count) if count < one.group.channels else whole
        left -= count * one.group.parameters_each
        total -= one.group.channels * one.group.parameters_each
    share = left / total if heads and total else share
    for one in groups:
        if one.group.unit != "head":
            decisions |= one.decisions(_width(one, budget, share))
    for unit in open_units:
        if unit.name not in inside:
            decisions[unit.name] = budget.low_rank(_rank(unit, budget, share, open_units))
    return {unit.name: decisions[unit.name] for unit in units}


def _width(one: Channels, budget: Budget, share: float) -> int:
    """Return the largest width that fits a share, at least the smallest there may be."""
    widths = one.widths(budget.multiple_of)
    fitting = [width for width in widths if width <= share * one.group.channels + 1e-9]
    if not widths:
        raise ParedError(
            f"{one.group.name} has {one.group.channels} channels, and widths are multiples of {budget.multiple_of}; "
            "take a smaller multiple_of"
        )
    return fitting[-1] if fitting else widths[0]


def _rank(unit: Unit, budget: Budget, share: float, units: Sequence[Unit]) -> int:
    """Return the largest rank that fits a share."""
    rank = budget.rank(unit, share) if share > 0 else 0
    if rank >= 1:
        return rank
    if budget.rank(unit) < 1:
        least = max(budget.cost(unit, 1) / unit.parameters for unit in units)
        raise ParedError(
            f"keep {budget.keep:g} leaves no rank for {unit.name} {unit.out_features} x {unit.in_features}; "
            f"the least keep that leaves one everywhere is {math.ceil(least * 1e4) / 1e4:g}"
        )
    return 1
