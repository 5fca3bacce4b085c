"""SVD-LLM V2's allocation: within each kind of layer, less is taken where uniform ranks lose more.

X. Wang et al., NAACL 2025, arXiv 2503.12340, section 3.1.
"""

import math
from collections.abc import Sequence

import torch

from pared.allocation.rank_budget import loss_on_paper_tokens, round_to_budget, split_fixed
from pared.allocation.units import Budget, Evidence, Unit
from pared.schema.plan import Decision


def svd_llm_v2(units: Sequence[Unit], budget: Budget, evidence: Evidence, _: object = None) -> dict[str, Decision]:
    """Take ``r_i = |g| R_c l_i / Σ_g l`` of unit i, with ``l_i = 1 / ln L_i`` and L_i its loss at uniform ranks.

    The formula needs ``L_i > 1``; losses scale with the number of tokens, which is the paper's here whatever was
    calibrated on, and of activations. The losses of a kind are multiplied by one number if the least of them is below
    e, so that the formula has a meaning at any scale; a weight that loses nothing has no part in that number, and is
    taken from as the one that loses least.

    Args:
        units: what can be decided.
        budget: the fraction to keep, and what a rank costs.
        evidence: the costs.

    Raises:
        ParedError: the budget does not buy one rank for every unit.
    """
    open_units, decisions, left = split_fixed(units, budget)
    kinds: dict[tuple[str, int], list[Unit]] = {}
    for unit in open_units:
        kinds.setdefault(unit.role, []).append(unit)
    ideal: dict[str, float] = {}
    for group in kinds.values():
        losses = [_loss(unit, budget, evidence.cost[unit.name]) for unit in group]
        for unit, ratio in zip(group, removal_ratios(losses, 1 - budget.keep), strict=True):
            ideal[unit.name] = max(budget.rank(unit, 1 - ratio), 1)
    decisions |= round_to_budget(open_units, ideal, left, budget)
    return {unit.name: decisions[unit.name] for unit in units}


def removal_ratios(losses: Sequence[float], removed: float) -> list[float]:
    """Return the fraction to remove of every member of a group, their mean being ``removed``; each below 1."""
    least = min((loss for loss in losses if loss > 0), default=math.e)
    scale = math.e / least if least < math.e else 1.0
    inverse_logs = [1 / math.log(max(loss * scale, math.e)) for loss in losses]
    mean = sum(inverse_logs) / len(inverse_logs)
    return [min(removed * inverse / mean, 1 - 1e-6) for inverse in inverse_logs]


def _loss(unit: Unit, budget: Budget, spectrum_R: torch.Tensor) -> float:
    return loss_on_paper_tokens(spectrum_R, budget.rank(unit))
