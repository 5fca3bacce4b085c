"""Global allocation by loss: one threshold on what a parameter buys decides every rank (ours).

LEMS (with KFAC-SVD, ICML 2026) scales the error of every layer to a measured divergence; here costs in nats, of ranks
as they are stored, of staying dense and of shared bases, meet in one exact budget.
"""

from collections.abc import Sequence

import torch

from pared.allocation.rank_budget import require_one_rank_each, split_fixed, tail_energy
from pared.allocation.units import Budget, Evidence, Unit
from pared.schema.plan import Decision, Dense

STEPS = 200  # of the bisection; the multiplier is then known to the last bit


def loss(units: Sequence[Unit], budget: Budget, evidence: Evidence, _: object = None) -> dict[str, Decision]:
    """Choose every unit's rank, or to leave it dense, so that the losses sum to the least the budget allows.

    For a multiplier t each unit takes the candidate with the least ``tail + t · cost``; t is bisected until the costs
    meet the budget, which is exact on the convex hull of the candidates. What is left is spent greedily on the steps
    that buy most. Losses of different units are compared as they are: a method whose losses have one unit
    (``loss-optimal``) is what this is for.

    Args:
        units: what can be decided.
        budget: the fraction to keep, and what a rank costs.
        evidence: the costs.

    Raises:
        ParedError: the budget does not buy one rank for every unit.
    """
    open_units, decisions, left = split_fixed(units, budget)
    tables = {unit.name: _candidates(unit, budget, evidence.cost[unit.name]) for unit in open_units}
    require_one_rank_each(left, sum(int(costs[0]) for costs, _ in tables.values()), len(tables))

    def choose(t: float) -> dict[str, int]:
        return {name: int((losses + t * costs).argmin()) for name, (costs, losses) in tables.items()}

    def cost(chosen: dict[str, int]) -> int:
        return int(sum(int(tables[name][0][index]) for name, index in chosen.items()))

    low, high = 0.0, 1.0 + max(float(losses[0]) for _, losses in tables.values())
    if cost(choose(low)) <= left:
        high = low
    for _ in range(STEPS if high else 0):
        middle = (low + high) / 2
        low, high = (middle, high) if cost(choose(middle)) > left else (low, middle)
    chosen = choose(high)
    _spend(tables, chosen, left - cost(chosen))
    for name, index in chosen.items():
        dense = index == len(tables[name][0]) - 1
        decisions[name] = (
            Dense(reason="worth more than its parameters elsewhere") if dense else budget.low_rank(index + 1)
        )
    return {unit.name: decisions[unit.name] for unit in units}


def _candidates(unit: Unit, budget: Budget, spectrum_R: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return costs and losses of rank 1, 2, ... and, last, of staying dense."""
    ranks = range(1, budget.most_rank(unit) + 1)
    costs = torch.tensor([*(budget.cost(unit, rank) for rank in ranks), unit.parameters], dtype=torch.float64)
    losses = torch.cat([tail_energy(spectrum_R)[1 : len(ranks) + 1].cpu(), costs.new_zeros(1)])
    return costs, losses


def _spend(tables: dict[str, tuple[torch.Tensor, torch.Tensor]], chosen: dict[str, int], left: int) -> None:
    """Spend what the hull left, always on the affordable candidate that buys most per parameter; in place."""
    while True:
        best, gain = None, 0.0
        for name, (costs, losses) in tables.items():
            index = chosen[name]
            more = costs[index + 1 :] - costs[index]
            affordable = int((more <= left).sum())
            if affordable:
                rates = (losses[index] - losses[index + 1 : index + 1 + affordable]) / more[:affordable]
                at = int(rates.argmax())
                if float(rates[at]) > gain:
                    best, gain = (name, index + 1 + at), float(rates[at])
        if best is None:
            return
        name, index = best
        left -= int(tables[name][0][index] - tables[name][0][chosen[name]])
        chosen[name] = index
