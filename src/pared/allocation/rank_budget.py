"""What every allocator by spectrum shares: tails, which units can be decided, and ranks that meet a budget exactly."""

import math
from collections.abc import Mapping, Sequence

import torch

from pared.allocation.units import Budget, Unit
from pared.errors import ParedError
from pared.schema.plan import Decision, Dense

PAPER_TOKENS = 256 * 2048  # of the calibration text of SVD-LLM, SVD-LLM V2 and Swift-SVD


def tail_energy(singular_values_R: torch.Tensor) -> torch.Tensor:
    """Return ``tail(k) = Σ_{j>k} s_j²`` for k = 0 to R, float64 ``(R + 1,)``."""
    squares_R = singular_values_R.double().square()
    return torch.cat([squares_R.flip(0).cumsum(0).flip(0), squares_R.new_zeros(1)])


def loss_on_paper_tokens(singular_values_R: torch.Tensor, rank: int) -> float:
    """Return the error a rank leaves, ``sqrt(Σ_{j>rank} s_j²)``, as it is summed over the papers' calibration text.

    Formulas that take the logarithm of a loss (SVD-LLM V2, Swift-SVD) read it off 256 windows of 2,048 tokens.
    Spectra here are per token, so that a plan does not depend on how much text there was.

    Args:
        singular_values_R: what leaving out each direction costs, per token.
        rank: that is kept.
    """
    return math.sqrt(PAPER_TOKENS * float(tail_energy(singular_values_R)[min(rank, len(singular_values_R))]))


def require_one_rank_each(parameters: int, least: int, units: int, noun: str = "parameters") -> None:
    """Check that a budget buys one rank for every unit.

    Raises:
        ParedError: it does not; says what one rank each costs.
    """
    if parameters < least:
        raise ParedError(
            f"the budget of {parameters:,} {noun} does not buy one rank for each of {units} weights "
            f"({least:,}); keep more"
        )


def round_to_budget(
    units: Sequence[Unit], ideal: Mapping[str, float], parameters: int, budget: Budget
) -> dict[str, Decision]:
    """Turn ideal ranks into whole ones that cost no more than a budget, and spend what rounding leaves.

    Ranks are scaled by one common factor, found by bisection, and held between 1 and the largest that saves anything;
    a unit that reaches that limit keeps its ideal surplus for the others by way of the factor. What is left is handed
    out one rank at a time to the unit that rounding took most from.

    Args:
        units: the units.
        ideal: wished ranks by unit, any positive numbers; only their proportions count.
        parameters: that may be stored in all.
        budget: what a rank costs.

    Raises:
        ParedError: the parameters do not buy one rank for every unit.
    """
    by_name = {unit.name: unit for unit in units}
    limit = {unit.name: max(1, budget.most_rank(unit)) for unit in units}
    require_one_rank_each(parameters, sum(budget.cost(unit, 1) for unit in units), len(units))

    def ranks(factor: float) -> dict[str, int]:
        return {name: min(limit[name], max(1, math.floor(factor * ideal[name] + 1e-9))) for name in by_name}

    def cost(chosen: Mapping[str, int]) -> int:
        return sum(budget.cost(by_name[name], rank) for name, rank in chosen.items())

    low, high = 0.0, max(limit[name] / ideal[name] for name in by_name)
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if cost(ranks(middle)) <= parameters else (low, middle)
    chosen = ranks(high if cost(ranks(high)) <= parameters else low)
    left = parameters - cost(chosen)
    for name in sorted(by_name, key=lambda name: chosen[name] - low * ideal[name]):
        more = budget.cost(by_name[name], chosen[name] + 1) - budget.cost(by_name[name], chosen[name])
        if chosen[name] < limit[name] and more <= left:
            chosen[name] += 1
            left -= more
    return {name: budget.low_rank(rank) for name, rank in chosen.items()}


def split_fixed(units: Sequence[Unit], budget: Budget) -> tuple[list[Unit], dict[str, Decision], int]:
    """Return the units that can be decided, the decisions of those that cannot, and what the budget has left."""
    fixed: dict[str, Decision] = {}
    for unit in units:
        if unit.idle:
            fixed[unit.name] = Dense(reason="never ran in the probe pass; nothing is known about its inputs")
        elif budget.most_rank(unit) < 1:
            fixed[unit.name] = Dense(reason="factors of rank 1 are no fewer parameters")
    total = budget.size(sum(unit.parameters for unit in units))
    dense = budget.size(sum(unit.parameters for unit in units if unit.name in fixed))
    return [unit for unit in units if unit.name not in fixed], fixed, math.floor(budget.keep * total + 1e-6) - dense
