"""Uniform allocation: every site keeps the same fraction of its parameters."""

import math
from collections.abc import Sequence

from pared.anatomy.structure import Site
from pared.errors import ParedError
from pared.plan import Decision, Dense, LowRank, rank_for


def uniform(sites: Sequence[Site], keep: float) -> dict[str, Decision]:
    """Give every site ``floor(keep · m · n / (m + n))`` ranks.

    A site that cannot be factorised into fewer parameters stays dense, and the others give up what it costs; if they
    cannot, the plan's ``shortfall`` tells.

    Args:
        sites: the covered sites.
        keep: fraction of their parameters that stays.

    Raises:
        ParedError: a site would be left without a single rank.
    """
    if keep == 1:
        return {site.name: Dense(reason="everything is kept") for site in sites}
    decisions: dict[str, Decision] = {}
    dense_cost = 0
    for site in sites:
        if site.idle:
            decisions[site.name] = Dense(reason="never ran in the probe pass; nothing is known about its inputs")
        elif min(site.out_features, site.in_features) == 1:
            decisions[site.name] = Dense(reason="a single row or column is not made smaller by factors")
        else:
            continue
        dense_cost += site.out_features * site.in_features
    rest = [site for site in sites if site.name not in decisions]
    total = sum(site.out_features * site.in_features for site in sites)
    share = keep
    if dense_cost and rest:
        share = (keep * total - dense_cost) / (total - dense_cost)
    for site in rest:
        rank = rank_for(share, site.out_features, site.in_features) if share > 0 else 0
        if rank < 1:
            if rank_for(keep, site.out_features, site.in_features) < 1:
                least = max(1 / s.out_features + 1 / s.in_features for s in rest)
                raise ParedError(
                    f"keep {keep:g} leaves no rank for {site.name} {site.out_features} x {site.in_features}; "
                    f"the least keep that leaves one everywhere is {math.ceil(least * 1e4) / 1e4:g}"
                )
            rank = 1
        decisions[site.name] = LowRank(rank=rank)
    return {site.name: decisions[site.name] for site in sites}
