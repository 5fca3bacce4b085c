"""What every allocator by spectrum shares: candidates with a cost and a loss, and ranks that meet a budget exactly."""

import math
from collections.abc import Mapping, Sequence

import torch

from pared.anatomy.structure import Site
from pared.errors import ParedError
from pared.plan import Decision, Dense, LowRank

Spectra = Mapping[str, torch.Tensor]  # site name -> what leaving out each direction costs, falling


def most_rank(site: Site) -> int:
    """Return the largest rank whose factors are fewer parameters than the dense weight; may be 0."""
    out_features, in_features = site.out_features, site.in_features
    return min((out_features * in_features - 1) // (out_features + in_features), out_features, in_features)


def tails(singular_values_R: torch.Tensor) -> torch.Tensor:
    """Return ``tail(k) = Σ_{j>k} s_j²`` for k = 0 to R, float64 ``(R + 1,)``."""
    squares_R = singular_values_R.double().square()
    return torch.cat([squares_R.flip(0).cumsum(0).flip(0), squares_R.new_zeros(1)])


def require_one_rank_each(budget: int, least: int, sites: int) -> None:
    """Check that a budget buys one rank for every site.

    Raises:
        ParedError: it does not; says what one rank each costs.
    """
    if budget < least:
        raise ParedError(
            f"the budget of {budget:,} parameters does not buy one rank for each of {sites} sites "
            f"({least:,}); keep more"
        )


def within_budget(sites: Sequence[Site], ideal: Mapping[str, float], budget: int) -> dict[str, Decision]:
    """Turn ideal ranks into whole ones that cost no more than a budget, and spend what rounding leaves.

    Ranks are scaled by one common factor, found by bisection, and held between 1 and the largest that saves anything;
    a site that reaches that limit keeps its ideal surplus for the others by way of the factor. What is left is handed
    out one rank at a time to the site that rounding took most from.

    Args:
        sites: the sites.
        ideal: wished ranks, any positive numbers; only their proportions count.
        budget: weight parameters in all.

    Raises:
        ParedError: the budget does not buy one rank for every site.
    """
    step = {site.name: site.out_features + site.in_features for site in sites}
    limit = {site.name: max(1, most_rank(site)) for site in sites}
    least = sum(step.values())
    require_one_rank_each(budget, least, len(sites))

    def ranks(factor: float) -> dict[str, int]:
        return {name: min(limit[name], max(1, math.floor(factor * ideal[name] + 1e-9))) for name in step}

    def cost(chosen: Mapping[str, int]) -> int:
        return sum(step[name] * rank for name, rank in chosen.items())

    low, high = 0.0, max(limit[name] / ideal[name] for name in step)
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if cost(ranks(middle)) <= budget else (low, middle)
    chosen = ranks(high if cost(ranks(high)) <= budget else low)
    left = budget - cost(chosen)
    for name in sorted(step, key=lambda name: chosen[name] - low * ideal[name]):
        if chosen[name] < limit[name] and step[name] <= left:
            chosen[name] += 1
            left -= step[name]
    return {name: LowRank(rank=rank) for name, rank in chosen.items()}


def set_aside(sites: Sequence[Site], keep: float) -> tuple[list[Site], dict[str, Decision], int]:
    """Return the sites that can be decided, the decisions of those that cannot, and the budget that is left.

    Args:
        sites: the covered sites.
        keep: fraction of all their parameters that stays.
    """
    fixed: dict[str, Decision] = {}
    for site in sites:
        if site.idle:
            fixed[site.name] = Dense(reason="never ran in the probe pass; nothing is known about its inputs")
        elif most_rank(site) < 1:
            fixed[site.name] = Dense(reason="factors of rank 1 are no fewer parameters")
    total = sum(site.out_features * site.in_features for site in sites)
    dense = sum(site.out_features * site.in_features for site in sites if site.name in fixed)
    return [site for site in sites if site.name not in fixed], fixed, math.floor(keep * total + 1e-6) - dense
