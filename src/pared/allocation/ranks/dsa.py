"""Ranks by a DSA program: what it makes of a block's spectra decides which share of the block's parameters goes."""

import logging
import math
from collections.abc import Mapping, Sequence

import torch

from pared.allocation.dsa import DEFAULT_OF_RANKS, PACKAGED, Program, ProgramResult, evaluate_program, named
from pared.allocation.options import DsaRanks
from pared.allocation.rank_budget import round_to_budget, split_fixed
from pared.allocation.units import Budget, Evidence, Unit
from pared.errors import ParedError
from pared.schema.plan import Decision

log = logging.getLogger(__name__)


def by_program(
    units: Sequence[Unit], budget: Budget, evidence: Evidence, program: Program, tokens: int = 1
) -> tuple[dict[str, Decision], ProgramResult]:
    """Return the decision of every unit, and the shares that a program takes from blocks.

    The program reads the singular values of all units of a block, as costs of leaving out directions, in place of
    scores. With ``s`` what it makes of them, mean ``1 - keep`` over parameters, every unit of block l is wished
    ``1 - s_l`` of its parameters, and whole ranks are fitted to the budget.

    Args:
        units: what can be decided.
        budget: the fraction to keep, and what a rank costs.
        evidence: the costs.
        program: what to judge the spectra by.
        tokens: spectra are read as sums over so many tokens; 1 as they are, per token.

    Returns:
        The decisions, none if the program is rejected; and why, or the shares of the blocks in their order.

    Raises:
        ParedError: the budget does not buy one rank for every unit.
    """
    open_units, fixed, left = split_fixed(units, budget)
    blocks = sorted({unit.block for unit in open_units})
    spectra = [
        torch.cat([evidence.cost[u.name] for u in open_units if u.block == block]) * math.sqrt(tokens)
        for block in blocks
    ]
    sizes_L = torch.tensor([sum(u.parameters for u in open_units if u.block == block) for block in blocks])
    verdict = evaluate_program(program, spectra, 1 - left / float(sizes_L.sum()), sizes_L)
    if verdict.sparsities_L is None:
        return {}, verdict
    keeps = {block: 1 - share for block, share in zip(blocks, verdict.sparsities_L.tolist(), strict=True)}
    return fixed | ranks_from_fractions(open_units, keeps, left, budget), verdict


def ranks_from_fractions(
    units: Sequence[Unit], keeps: Mapping[int, float], parameters: int, budget: Budget
) -> dict[str, Decision]:
    """Return the ranks of units that are wished a share of their parameters by block, fitted to a budget."""
    return round_to_budget(
        units, {u.name: _target_rank(u, keeps[u.block], budget.pivoted) for u in units}, parameters, budget
    )


def dsa(units: Sequence[Unit], budget: Budget, evidence: Evidence, options: DsaRanks) -> dict[str, Decision]:
    """Return the decision of every unit by the program that the options name.

    The default, which is defined for all spectra that are not zero, gives every unit the same share where it tells no
    block from another.

    Raises:
        ParedError: another program is rejected; says why. Or the budget does not buy one rank for every unit.
    """
    program, tokens = named(options.program, tokens=1)
    if options.program in PACKAGED:
        tokens = 1  # those of packaged programs are of Wanda's scores
    decisions, verdict = by_program(units, budget, evidence, program, options.score_tokens or tokens)
    if verdict.reasons and options.program == DEFAULT_OF_RANKS:
        log.warning("allocation dsa: %s; every unit keeps the same share", verdict.reasons[0])
        evidence.notes["allocation"] = f"{verdict.reasons[0]}: every unit keeps the same share"
        open_units, fixed, left = split_fixed(units, budget)
        keep = left / max(sum(unit.parameters for unit in open_units), 1)
        decisions = fixed | ranks_from_fractions(open_units, {unit.block: keep for unit in open_units}, left, budget)
    elif verdict.reasons:
        raise ParedError(f"allocation dsa: {'; '.join(verdict.reasons)}")
    return {unit.name: decisions[unit.name] for unit in units}


def _target_rank(unit: Unit, keep: float, pivoted: bool) -> float:
    """Return the rank, not whole, that stores a share of a unit's parameters."""
    m, n = unit.out_features, unit.in_features
    if not pivoted:
        return keep * m * n / (m + n)
    return ((m + n) - math.sqrt((m + n) ** 2 - 4 * keep * m * n)) / 2
