"""Global allocation by loss: one threshold on what a parameter buys decides every rank and every width (ours).

LEMS (with KFAC-SVD, ICML 2026) scales the error of every layer to a measured divergence; here costs in nats, of ranks
as they are stored, of widths, of staying dense and of shared bases, meet in one exact budget.
"""

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import torch

from pared.allocation.rank_budget import require_one_rank_each, split_fixed, tail_energy
from pared.allocation.ranks.composed import Composed, Table
from pared.allocation.ranks.forms import ranks_in_forms
from pared.allocation.units import Budget, Channels, Evidence, Unit
from pared.allocation.widths.groups import require_affordable_widths
from pared.schema.plan import Decision, Dense

STEPS = 200  # of the bisection at most; it ends where two multipliers have no other between them
DENSE = Dense(reason="worth more than its parameters elsewhere")
APART = Dense(reason="in no channel group")


def loss(units: Sequence[Unit], budget: Budget, evidence: Evidence, _: object = None) -> dict[str, Decision]:
    """Choose every unit's rank, or to leave it dense, so that the losses sum to the least the budget allows.

    For a multiplier t each unit takes the candidate with the least ``tail + t · cost``; t is bisected until the costs
    meet the budget, which is exact on the convex hull of the candidates. What is left is spent greedily on the steps
    that buy most. Losses of different units are compared as they are: a method whose losses have one unit
    (``loss-optimal``) is what this is for.

    The layers of a channel group take whichever is cheapest at t: one width, what each of them takes by itself, or a
    width and ranks of what it leaves of them. Where the budget is of widths alone, all that is in no group stays dense.
    Where it is one of bytes every candidate is there in every form of few bits too, with what rounding to it costs.

    Args:
        units: what can be decided.
        budget: the fraction to keep, and what a rank costs.
        evidence: the costs.

    Raises:
        ParedError: the budget does not buy one rank for every unit, or no widths that are small enough.
    """
    open_units, decisions, left = split_fixed(units, budget)
    there = _Candidates(open_units, budget, evidence)
    if budget.structures == "widths":
        require_affordable_widths(left, there.least(), len(there.groups), budget, units)
    else:
        require_one_rank_each(left, there.least(), len(there.units), budget.noun)
    low, high = 0.0, 1.0 + max(float(table.losses[0]) for table in (*there.units.values(), *there.groups.values()))
    if there.cost(there.choose(low)) <= left:
        high = low
    for _ in range(STEPS if high else 0):
        middle = (low + high) / 2
        if middle in (low, high):  # known to the last bit already
            break
        low, high = (middle, high) if there.cost(there.choose(middle)) > left else (low, middle)
    chosen = there.choose(high)
    _spend(there.parts(chosen), left - there.cost(chosen))
    decisions |= there.decisions(chosen)
    return {unit.name: decisions[unit.name] for unit in units}


class _Chosen(NamedTuple):
    """The candidates that are chosen, by index.

    Attributes:
        alone: of units by themselves.
        together: widths of channel groups, in place of their units.
        composed: of channel groups too: a width, and candidates of the layers that it leaves, by site.
    """

    alone: dict[str, int]
    together: dict[str, int]
    composed: dict[str, tuple[int, dict[str, int]]]


class _Candidates:
    """What there is to choose from: a table for every unit, and one for every channel group that can be decided."""

    def __init__(self, units: Sequence[Unit], budget: Budget, evidence: Evidence) -> None:
        self._budget = budget
        of_unit = partial(ranks_in_forms if budget.of_bytes else _ranks, budget=budget, evidence=evidence)
        self.units = {unit.name: of_unit(unit) for unit in units}
        self._channels = {
            name: one
            for name, one in evidence.groups(budget).items()
            if one.cost is not None and all(site.name in self.units for site in one.group.sites)
        }
        self.groups = {name: _widths(one, budget) for name, one in self._channels.items()}
        self._composed = {
            name: Composed(one, budget, evidence)
            for name, one in self._channels.items()
            if one.energies and budget.structures == "mixed" and Composed.widths_of(one, budget)
        }
        self._members = {name: [site.name for site in one.group.sites] for name, one in self._channels.items()}
        inside = {site for members in self._members.values() for site in members}
        self._alone = [name for name in self.units if name not in inside]

    def least(self) -> int:
        """Return the fewest parameters there may be."""
        costs = {name: int(table.costs[0]) for name, table in self.units.items()}
        apart = {name: sum(costs[site] for site in members) for name, members in self._members.items()}
        together = {name: int(table.costs[0]) for name, table in self.groups.items()}
        together |= {name: min(together[name], one.least()) for name, one in self._composed.items()}
        return sum(costs[name] for name in self._alone) + sum(min(apart[name], together[name]) for name in apart)

    def choose(self, t: float) -> _Chosen:
        """Return what is best at a multiplier."""
        best = {name: table.best(t) for name, table in self.units.items()}
        chosen = _Chosen({name: best[name][1] for name in self._alone}, {}, {})
        for name, table in self.groups.items():
            value, index = table.best(t)
            apart = sum(best[site][0] for site in self._members[name])
            if name in self._composed:
                both, width, ranks = self._composed[name].best(t)
                if both < min(value, apart):
                    chosen.composed[name] = width, ranks
                    continue
            if value < apart:
                chosen.together[name] = index
            else:
                chosen.alone.update({site: best[site][1] for site in self._members[name]})
        return chosen

    def parts(self, chosen: _Chosen) -> list[tuple[Mapping[str, Table], dict[str, int]]]:
        """Return the tables of what is chosen, and the indices, which may be raised in place."""
        return [(self.units, chosen.alone), (self.groups, chosen.together), *(
            ({site: self._composed[name].table(site, width) for site in ranks}, ranks)
            for name, (width, ranks) in chosen.composed.items()
        )]  # fmt: skip

    def cost(self, chosen: _Chosen) -> int:
        """Return the parameters, or bytes, of what is chosen."""
        return sum(
            int(tables[name].costs[index]) for tables, indices in self.parts(chosen) for name, index in indices.items()
        )

    def decisions(self, chosen: _Chosen) -> dict[str, Decision]:
        """Return the decision of every unit."""
        made: dict[str, Decision] = {}
        inside = {site for members in self._members.values() for site in members}
        for name, index in chosen.alone.items():
            size, form = self.units[name].size(index), self.units[name].form(index)
            apart = DENSE if name in inside or self._budget.structures != "widths" else APART
            decision = apart if size is None else self._budget.low_rank(size)
            made[name] = decision if form is None else decision.model_copy(update={"quantized": form})
        for name, index in chosen.together.items():
            size = self.groups[name].size(index)
            one = self._channels[name]
            made |= dict.fromkeys(self._members[name], DENSE) if size is None else one.decisions(size)
        for name, (width, ranks) in chosen.composed.items():
            composed = self._composed[name]
            for site, narrow in self._channels[name].decisions(composed.widths[width]).items():
                rank = composed.table(site, width).size(ranks[site])
                made[site] = narrow if rank is None else narrow.ranked(rank, self._budget.pivoted)
        return made


def _ranks(unit: Unit, budget: Budget, evidence: Evidence) -> Table:
    """Return rank 1, 2, ... and, last, staying dense; that alone where ranks are not to be decided."""
    ranked = budget.structures != "widths"
    ranks = range(1, budget.most_rank(unit) + 1) if ranked else range(0)
    costs = torch.tensor([*(budget.cost(unit, rank) for rank in ranks), unit.parameters], dtype=torch.float64)
    tails = tail_energy(evidence.cost[unit.name])[1 : len(ranks) + 1].cpu() if ranked else costs[:0]
    return Table(costs, torch.cat([tails, costs.new_zeros(1)]), ranks)


def _widths(one: Channels, budget: Budget) -> Table:
    """Return the widths there may be, rising, and, last, keeping all channels."""
    assert one.cost is not None
    widths, group = one.widths(budget.multiple_of), one.group
    costs = torch.tensor([*widths, group.channels], dtype=torch.float64) * group.parameters_each
    tails = tail_energy(one.cost).cpu()[torch.tensor(list(widths), dtype=torch.long) * group.inputs]
    return Table(costs, torch.cat([tails, costs.new_zeros(1)]), widths)


def _spend(chosen: Iterable[tuple[Mapping[str, Table], dict[str, int]]], left: int) -> None:
    """Spend what the hull left, always on the affordable candidate that buys most per parameter; in place."""
    parts = list(chosen)
    while True:
        best, gain = None, 0.0
        for tables, indices in parts:
            for name, index in indices.items():
                costs, losses = tables[name].costs, tables[name].losses
                more = costs[index + 1 :] - costs[index]
                affordable = int((more <= left).sum())
                if affordable:
                    rates = (losses[index] - losses[index + 1 : index + 1 + affordable]) / more[:affordable]
                    at = int(rates.argmax())
                    if float(rates[at]) > gain:
                        best, gain = (tables, indices, name, index + 1 + at), float(rates[at])
        if best is None:
            return
        tables, indices, name, index = best
        left -= int(tables[name].costs[index] - tables[name].costs[indices[name]])
        indices[name] = index
