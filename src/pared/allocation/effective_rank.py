"""D-Rank: ranks by the effective rank of what a layer puts out (arXiv 2509.25622, "Layer-wise Dynamic Rank")."""

import math
from collections.abc import Sequence

import torch

from pared.allocation.budget import Spectra, set_aside, within_budget
from pared.anatomy.structure import Site
from pared.plan import Decision

TRANSFER = 0.3  # share of the parameters of q and k that moves to v


def effective_rank(sites: Sequence[Site], keep: float, spectra: Spectra) -> dict[str, Decision]:
    """Give site g a rank in proportion to ``sqrt(R_g / w_g)``, then move a share from q and k to v of each block.

    ``R = exp(-Σ p ln p)`` with ``p = s² / Σ s²`` is the effective rank, ``w = out + in`` what one rank costs; the ranks
    minimise ``Σ R_g / k_g`` under the budget.

    Args:
        sites: the covered sites.
        keep: fraction of their parameters that stays.
        spectra: for every site, what leaving out each direction costs.

    Raises:
        ParedError: the budget does not buy one rank for every site.
    """
    open_sites, decisions, budget = set_aside(sites, keep)
    ideal = {site.name: math.sqrt(entropy_rank(spectra[site.name]) / _step(site)) for site in open_sites}
    scale = budget / sum(ideal[site.name] * _step(site) for site in open_sites)
    ideal = {name: max(scale * rank, 1e-9) for name, rank in ideal.items()}
    _transfer(open_sites, ideal)
    decisions |= within_budget(open_sites, ideal, budget)
    return {site.name: decisions[site.name] for site in sites}


def entropy_rank(singular_values_R: torch.Tensor) -> float:
    """Return the effective rank ``exp(-Σ p ln p)``, between 1 and R."""
    p_R = singular_values_R.double().square()
    p_R = p_R / p_R.sum().clamp(min=torch.finfo(p_R.dtype).tiny)
    return math.exp(-float(torch.special.xlogy(p_R, p_R).sum()))


def _transfer(sites: Sequence[Site], ideal: dict[str, float]) -> None:
    """Move parameters from q and k to v of the same block, in place; fused projections have nothing to move."""
    blocks: dict[int, dict[str, Site]] = {}
    for site in sites:
        if site.kind in ("q", "k", "v"):
            blocks.setdefault(site.block, {})[site.kind] = site
    for by_kind in blocks.values():
        if by_kind.keys() == {"q", "k", "v"}:
            moved = 0.0
            for kind in ("q", "k"):
                site = by_kind[kind]
                moved += TRANSFER * ideal[site.name] * _step(site)
                ideal[site.name] *= 1 - TRANSFER
            ideal[by_kind["v"].name] += moved / _step(by_kind["v"])


def _step(site: Site) -> int:
    return site.out_features + site.in_features
