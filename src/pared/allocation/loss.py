"""Global allocation by loss: one threshold on what a parameter buys decides every rank (loss_optimal, section 2)."""

from collections.abc import Sequence

import torch

from pared.allocation.budget import Spectra, most_rank, require_one_rank_each, set_aside, tails
from pared.anatomy.structure import Site
from pared.plan import Decision, Dense, LowRank

STEPS = 200  # of the bisection; the multiplier is then known to the last bit


def loss(sites: Sequence[Site], keep: float, spectra: Spectra) -> dict[str, Decision]:
    """Choose every site's rank, or to leave it dense, so that the losses sum to the least the budget allows.

    For a multiplier t each site takes the candidate with the least ``tail + t · cost``; t is bisected until the costs
    meet the budget, which is exact on the convex hull of the candidates. What is left is spent greedily on the steps
    that buy most. Losses of different sites are compared as they are: a method whose losses have one unit
    (``loss-optimal``) is what this is for.

    Args:
        sites: the covered sites.
        keep: fraction of their parameters that stays.
        spectra: for every site, what leaving out each direction costs.

    Raises:
        ParedError: the budget does not buy one rank for every site.
    """
    open_sites, decisions, budget = set_aside(sites, keep)
    tables = {site.name: _candidates(site, spectra[site.name]) for site in open_sites}
    require_one_rank_each(budget, sum(int(costs[0]) for costs, _ in tables.values()), len(tables))

    def choose(t: float) -> dict[str, int]:
        return {name: int((losses + t * costs).argmin()) for name, (costs, losses) in tables.items()}

    def cost(chosen: dict[str, int]) -> int:
        return int(sum(int(tables[name][0][index]) for name, index in chosen.items()))

    low, high = 0.0, 1.0 + max(float(losses[0]) for _, losses in tables.values())
    if cost(choose(low)) <= budget:
        high = low
    for _ in range(STEPS if high else 0):
        middle = (low + high) / 2
        low, high = (middle, high) if cost(choose(middle)) > budget else (low, middle)
    chosen = choose(high)
    _spend(tables, chosen, budget - cost(chosen))
    for site in open_sites:
        index, (costs, _) = chosen[site.name], tables[site.name]
        dense = index == len(costs) - 1
        decisions[site.name] = (
            Dense(reason="worth more than its parameters elsewhere") if dense else LowRank(rank=index + 1)
        )
    return {site.name: decisions[site.name] for site in sites}


def _candidates(site: Site, spectrum_R: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return costs and losses of rank 1, 2, ... and, last, of staying dense."""
    ranks = torch.arange(1, most_rank(site) + 1, dtype=torch.float64)
    dense = float(site.out_features * site.in_features)
    costs = torch.cat([ranks * (site.out_features + site.in_features), ranks.new_tensor([dense])])
    losses = torch.cat([tails(spectrum_R)[1 : len(ranks) + 1].cpu(), ranks.new_zeros(1)])
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
