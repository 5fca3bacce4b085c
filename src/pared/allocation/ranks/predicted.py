"""What a plan of ranks and widths is expected to lose, added up over its units: one point of a curve over budgets."""

from collections.abc import Mapping, Sequence

from pared.allocation.rank_budget import tail_energy
from pared.allocation.ranks.composed import Composed
from pared.allocation.units import Budget, Evidence, Unit
from pared.schema.plan import Decision, LowRank, Shared
from pared.schema.width import Width


def predicted_loss(
    units: Sequence[Unit], decisions: Mapping[str, Decision], budget: Budget, evidence: Evidence
) -> float:
    """Return the sum of the losses of all decisions: of ``loss-optimal`` in nats a token, ``½ Σ_{j>k} s_j²`` each.

    It is the quantity that the allocation ``loss`` makes least, so that over falling budgets it never falls.

    Args:
        units: that were decided.
        decisions: of each by name.
        budget: they were made for.
        evidence: they were made from.
    """
    total = 0.0
    for unit in units:
        if isinstance(decision := decisions[unit.name], (LowRank, Shared)):
            total += float(tail_energy(evidence.cost[unit.name])[decision.rank])
    for name, one in evidence.groups(budget).items():
        width = decisions.get(name)
        if not isinstance(width, Width) or one.cost is None:
            continue
        total += float(tail_energy(one.cost)[width.width * one.group.inputs])
        ranked = {site.name: found.rank for site in one.group.sites
                  if isinstance(found := decisions[site.name], Width) and found.rank is not None}  # fmt: skip
        if ranked:
            composed = Composed(one, budget, evidence)
            place = composed.widths.index(width.width)
            total += sum(float(composed.table(site, place).losses[rank - 1]) for site, rank in ranked.items())
    return total / 2
