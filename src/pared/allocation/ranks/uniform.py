"""Uniform allocation: every unit keeps the same fraction of its parameters."""

import math
from collections.abc import Sequence

from pared.allocation.rank_budget import split_fixed
from pared.allocation.units import Budget, Evidence, Unit
from pared.errors import ParedError
from pared.schema.plan import Decision, Dense


def uniform(units: Sequence[Unit], budget: Budget, _: Evidence, __: object = None) -> dict[str, Decision]:
    """Give every unit the largest rank whose storage fits the fraction that is kept.

    A unit that cannot be factorised into fewer parameters stays dense, and the others give up what it costs; if they
    cannot, the plan's ``shortfall`` tells.

    Args:
        units: what can be decided.
        budget: the fraction to keep, and what a rank costs.

    Raises:
        ParedError: a unit would be left without a single rank.
    """
    if budget.keep == 1:
        return {unit.name: Dense(reason="everything is kept") for unit in units}
    open_units, decisions, left = split_fixed(units, budget)
    total = sum(unit.parameters for unit in open_units)
    share = left / total if decisions and open_units else budget.keep
    for unit in open_units:
        rank = budget.rank(unit, share) if share > 0 else 0
        if rank < 1:
            if budget.rank(unit) < 1:
                least = max(budget.cost(unit, 1) / unit.parameters for unit in open_units)
                raise ParedError(
                    f"keep {budget.keep:g} leaves no rank for {unit.name} {unit.out_features} x {unit.in_features}; "
                    f"the least keep that leaves one everywhere is {math.ceil(least * 1e4) / 1e4:g}"
                )
            rank = 1
        decisions[unit.name] = budget.low_rank(rank)
    return {unit.name: decisions[unit.name] for unit in units}
