"""FWSVD's budget: a rank, the same fraction of the full rank of every weight."""

from collections.abc import Sequence

from pared.allocation.units import Budget, Unit
from pared.errors import ParedError
from pared.schema.plan import Decision, Dense, LowRank


def rank_fraction(units: Sequence[Unit], fraction: float, pivoted: bool = False) -> dict[str, Decision]:
    """Give every unit the rank ``r = int(fraction · min(out, in))`` (Hsu et al., ICLR 2022, arXiv 2207.00112).

    The budget is a rank, not a number of parameters: a square weight becomes smaller below a fraction of 0.5 only,
    0.3 of its ranks being 0.6 of its parameters. A unit whose factors are no smaller than its weight is given its
    rank all the same, because that is what was asked for; the plan's sizes tell.

    Args:
        units: what can be decided.
        fraction: of the full rank, in (0, 1].
        pivoted: low-rank results are stored by pivots.

    Raises:
        ParedError: the fraction is out of range, or leaves a unit without a rank.
    """
    if not 0 < fraction <= 1:
        raise ParedError(f"rank_fraction is the fraction of the full rank that stays, in (0, 1]; got {fraction}")
    decisions: dict[str, Decision] = {}
    for unit in units:
        most = min(unit.out_features, unit.in_features)
        rank = int(fraction * most + 1e-9)  # 0.29 · 100 is 28.999999999999996
        if unit.idle:
            decisions[unit.name] = Dense(reason="never ran in the probe pass; nothing is known about its inputs")
        elif rank < 1 and Budget(1.0, pivoted).most_rank(unit) < 1:
            decisions[unit.name] = Dense(reason="no rank of it is smaller than the weight")
        elif rank < 1:
            raise ParedError(
                f"rank_fraction {fraction:g} leaves no rank for {unit.name} {unit.out_features} x {unit.in_features}; "
                f"the least that leaves one is {1 / most:.4g}"
            )
        else:
            decisions[unit.name] = LowRank(rank=rank, pivoted=pivoted)
    return decisions
