"""D-Rank: ranks by the effective rank of what a layer outputs (arXiv 2509.25622, "Layer-wise Dynamic Rank")."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from pared.allocation.rank_budget import round_to_budget, split_fixed
from pared.allocation.units import Budget, Evidence, Unit
from pared.schema.plan import Decision

if TYPE_CHECKING:
    from pared.structure.model import Site

TRANSFER = 0.3  # share of the parameters of q and k that moves to v


def effective_rank(units: Sequence[Unit], budget: Budget, evidence: Evidence, _: object = None) -> dict[str, Decision]:
    """Give unit g a rank in proportion to ``sqrt(R_g / w_g)``, then move a share from q and k to v of each block.

    ``R = exp(-Σ p ln p)`` with ``p = s² / Σ s²`` is the effective rank, ``w = out + in`` what one rank costs; the ranks
    minimise ``Σ R_g / k_g`` under the budget.

    Args:
        units: what can be decided.
        budget: the fraction to keep, and what a rank costs.
        evidence: the costs.

    Raises:
        ParedError: the budget does not buy one rank for every unit.
    """
    open_units, decisions, left = split_fixed(units, budget)
    ideal = {unit.name: math.sqrt(entropy_rank(evidence.cost[unit.name]) / _step(unit)) for unit in open_units}
    scale = left / sum(ideal[unit.name] * _step(unit) for unit in open_units)
    ideal = {name: max(scale * rank, 1e-9) for name, rank in ideal.items()}
    _transfer(open_units, units, ideal)
    decisions |= round_to_budget(open_units, ideal, left, budget)
    return {unit.name: decisions[unit.name] for unit in units}


def entropy_rank(singular_values_R: torch.Tensor) -> float:
    """Return the effective rank ``exp(-Σ p ln p)``, between 1 and R."""
    p_R = singular_values_R.double().square()
    p_R = p_R / p_R.sum().clamp(min=torch.finfo(p_R.dtype).tiny)
    return math.exp(-float(torch.special.xlogy(p_R, p_R).sum()))


def _transfer(units: Sequence[Unit], among: Sequence[Unit], ideal: dict[str, float]) -> None:
    """Move parameters from q and k to v of the same block, in place; fused projections have nothing to move.

    q, k and v are assumed to be three layers of one module that read one tensor, in the order they run, k and v of one
    height that divides q's; and the layer of that module that runs next, if there is one (BERT's is in another
    module), to read the heads of all queries: as many features as q outputs. Three projections of which a product of
    the same width is read next look just so, and are taken for attention.

    Args:
        units: which parameters may move between.
        among: these and others, which are read only.
        ideal: ranks by unit, changed in place.
    """
    sites = [site for unit in among for site in unit.members]
    together: dict[tuple[object, ...], list[Unit]] = {}
    for unit in units:
        first = unit.members[0]
        together.setdefault((unit.block, first.parent, first.reads), []).append(unit)
    for group in together.values():
        if len(group) != 3:
            continue
        q, k, v = sorted(group, key=_position)
        after = [site for site in sites if _place(site) == _place(v.members[0]) and site.position > _position(v)]
        output = min(after, key=lambda site: site.position, default=None)
        if _rows(k) != _rows(v) or _rows(q) % _rows(k):
            continue
        if output is not None and output.in_features != _rows(q):
            continue
        moved = 0.0
        for unit in (q, k):
            moved += TRANSFER * ideal[unit.name] * _step(unit)
            ideal[unit.name] *= 1 - TRANSFER
        ideal[v.name] += moved / _step(v)


def _place(site: "Site") -> tuple[int, str]:
    return site.block, site.parent


def _position(unit: Unit) -> int:
    return unit.members[0].position


def _rows(unit: Unit) -> int:
    return unit.members[0].out_features


def _step(unit: Unit) -> int:
    return unit.out_features + unit.in_features
