"""What every allocator that decides widths shares: which channel groups can be decided, and what they can reach."""

import math
from collections.abc import Sequence

from pared.allocation.units import Budget, Channels, Evidence, Unit
from pared.errors import ParedError
from pared.schema.plan import Decision, Dense


def require_affordable_widths(left: int, least: int, groups: int, budget: Budget, units: Sequence[Unit]) -> None:
    """Check that the smallest widths there may be are small enough, where nothing else is made smaller.

    Args:
        left: parameters that the budget leaves for what can be decided.
        least: what that takes with the smallest widths.
        groups: how many channel groups there are.
        budget: of which it is what is left.
        units: all that it is for.

    Raises:
        ParedError: they are not, or there are no groups; says what can be reached.
    """
    if not groups:
        raise ParedError("structures widths: no channels were found that can be taken out; take ranks or mixed")
    if left < least:
        total = sum(unit.parameters for unit in units)
        lowest = (math.floor(budget.keep * total + 1e-6) - left + least) / total
        raise ParedError(
            f"keep {budget.keep:g} cannot be reached by widths of {groups} channel groups alone, in multiples of "
            f"{budget.multiple_of}; the least is {math.ceil(lowest * 1e4) / 1e4:g}, mixed structures go further"
        )


def split_apart(
    units: Sequence[Unit], left: int, budget: Budget, evidence: Evidence, asked: Sequence[Unit]
) -> tuple[list[Channels], dict[str, Decision], int]:
    """Return the channel groups that can be decided, what stays dense where widths alone are, and what is left.

    Args:
        units: that can be decided.
        left: parameters for them.
        budget: of which it is what is left.
        evidence: the channel groups.
        asked: all that the budget is for.

    Raises:
        ParedError: there are no groups, or the smallest widths there may be are too large.
    """
    names = {unit.name for unit in units}
    groups = [one for one in evidence.groups(budget).values() if all(site.name in names for site in one.group.sites)]
    if budget.structures != "widths":
        return groups, {}, left
    inside = {site.name for one in groups for site in one.group.sites}
    apart = [unit for unit in units if unit.name not in inside]
    left -= sum(unit.parameters for unit in apart)
    least = sum(one.group.parameters_each * one.widths(budget.multiple_of).start for one in groups)
    require_affordable_widths(left, least, len(groups), budget, asked)
    return groups, {unit.name: Dense(reason="in no channel group") for unit in apart}, left
