"""SVD-LLM V2's allocation: within each kind of layer, less is taken where uniform ranks lose more.

X. Wang et al., NAACL 2025, arXiv 2503.12340, section 3.1.
"""

import math
from collections.abc import Sequence

from pared.allocation.budget import Spectra, set_aside, tails, within_budget
from pared.anatomy.structure import Site
from pared.plan import Decision, rank_for


def svd_llm_v2(sites: Sequence[Site], keep: float, spectra: Spectra) -> dict[str, Decision]:
    """Take ``r_i = |g| R_c l_i / Σ_g l`` of site i, with ``l_i = 1 / ln L_i`` and L_i its loss at uniform ranks.

    The formula needs ``L_i > 1``; losses scale with the number of tokens and of activations. The losses of a kind are
    multiplied by one number if the least of them is below e, so that the formula has a meaning at any scale.

    Args:
        sites: the covered sites.
        keep: fraction of their parameters that stays.
        spectra: for every site, what leaving out each direction costs.

    Raises:
        ParedError: the budget does not buy one rank for every site.
    """
    open_sites, decisions, budget = set_aside(sites, keep)
    kinds: dict[str, list[Site]] = {}
    for site in open_sites:
        kinds.setdefault(site.kind, []).append(site)
    ideal: dict[str, float] = {}
    for group in kinds.values():
        removed = removal_ratios([_loss(site, keep, spectra) for site in group], 1 - keep)
        for site, ratio in zip(group, removed, strict=True):
            full = site.out_features * site.in_features / (site.out_features + site.in_features)
            ideal[site.name] = max((1 - ratio) * full, 1e-9)
    decisions |= within_budget(open_sites, ideal, budget)
    return {site.name: decisions[site.name] for site in sites}


def removal_ratios(losses: Sequence[float], removed: float) -> list[float]:
    """Return the fraction to remove of every member of a group, their mean being ``removed``; each below 1."""
    least = min(losses)
    scale = math.e / least if 0 < least < math.e else 1.0
    inverse_logs = [1 / math.log(max(loss * scale, math.e)) for loss in losses]
    mean = sum(inverse_logs) / len(inverse_logs)
    return [min(removed * inverse / mean, 1 - 1e-6) for inverse in inverse_logs]


def _loss(site: Site, keep: float, spectra: Spectra) -> float:
    rank = min(rank_for(keep, site.out_features, site.in_features), len(spectra[site.name]))
    return math.sqrt(float(tails(spectra[site.name])[rank]))
