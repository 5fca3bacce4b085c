"""Swift-SVD's dynamic allocation: ranks by loss and by the influence of blocks, the mixture of both tried on a text.

R. Qi et al., ICML 2026, arXiv 2604.01609, section 3.3.
"""

import logging
import math
from collections.abc import Mapping, Sequence

from pared.allocation.rank_budget import loss_on_paper_tokens, split_fixed
from pared.allocation.units import Budget, Evidence, Unit
from pared.errors import ParedError
from pared.schema.plan import Decision, Dense

log = logging.getLogger(__name__)

FLOOR = 0.5  # delta: the share of the uniform rank that every weight keeps
ALPHAS = tuple(step / 10 for step in range(11))


def swift(units: Sequence[Unit], budget: Budget, evidence: Evidence, _: object = None) -> dict[str, Decision]:
    """Give every weight half its uniform rank, and share the other half out by score within its kind and shape.

    The score of a weight in block i is ``β_i^α · ln(e + ε_i)^(1-α)``: ``β`` the block's influence scaled to [1, 2] over
    the blocks, ``ε`` the loss at the uniform rank. Every α of 0, 0.1 ... 1 is tried and the least perplexity wins, the
    smaller α among equals. (The released code takes the whole norm for ε, ``ln(1 + ε)``, and another floor.)

    Args:
        units: what can be decided.
        budget: the fraction to keep, and what a rank costs.
        evidence: the costs, the influence of every block, and a trial.

    Raises:
        ParedError: the budget leaves a weight without a rank, or there is no trial.
    """
    if evidence.trial is None:
        raise ParedError("allocation swift tries its proposals on a text; there is nothing to try them by")
    open_units, fixed, left = split_fixed(units, budget)
    if budget.keep == 1:
        return {unit.name: Dense(reason="everything is kept") for unit in units}
    share = left / max(sum(unit.parameters for unit in open_units), 1)
    kinds: dict[tuple[object, ...], list[Unit]] = {}
    for unit in open_units:
        if budget.rank(unit, share) < 1:
            raise ParedError(f"keep {budget.keep:g} leaves no rank for {unit.name}; keep more")
        kinds.setdefault((unit.role, unit.out_features, unit.in_features), []).append(unit)
    beta = scaled(evidence.influence)
    tried: dict[tuple[int, ...], float] = {}
    best: dict[str, Decision] = {}
    for alpha in ALPHAS:
        ranks: dict[str, int] = {}
        for members in kinds.values():
            uniform, full = budget.rank(members[0], share), budget.most_rank(members[0])
            losses = [loss_on_paper_tokens(evidence.cost[unit.name], uniform) for unit in members]
            chosen = swift_ranks(uniform, full, [beta[unit.block] for unit in members], losses, alpha)
            ranks |= {unit.name: rank for unit, rank in zip(members, chosen, strict=True)}
        if (key := tuple(ranks.values())) in tried:
            continue
        decisions: dict[str, Decision] = {name: budget.low_rank(rank) for name, rank in ranks.items()}
        perplexity = evidence.trial(decisions)
        tried[key] = math.inf if math.isnan(perplexity) else perplexity
        log.info("allocation swift: alpha %g gives perplexity %.4f", alpha, tried[key])
        if tried[key] == min(tried.values()) and list(tried.values()).count(tried[key]) == 1:
            best = decisions
    decided = {**fixed, **best}
    return {unit.name: decided[unit.name] for unit in units}


def swift_ranks(
    uniform: int, full: int, beta: Sequence[float], losses: Sequence[float], alpha: float, floor: float = FLOOR
) -> list[int]:
    """Return the ranks of one kind of weight; they sum to no more than uniform ranks do.

    With pivoted storage a rank costs less the more there are, so that unequal ranks of one sum never cost more.

    Args:
        uniform: rank of every weight if all had the same.
        full: the largest rank that saves anything.
        beta: influence of every weight's block, in [1, 2].
        losses: of every weight at the uniform rank.
        alpha: 0 goes by losses alone, 1 by influence alone.
        floor: share of the uniform rank that none goes below; 1 is uniform.
    """
    least = min(max(1, math.ceil(floor * uniform)), uniform)
    scores = [b**alpha * math.log(math.e + loss) ** (1 - alpha) for b, loss in zip(beta, losses, strict=True)]
    ranks = [least] * len(scores)
    pool = (uniform - least) * len(scores)
    room = [i for i in range(len(scores)) if ranks[i] < full]
    while pool > 0 and room:  # a weight that is full leaves its share to the others
        total = sum(scores[i] for i in room)
        grants = {i: min(int(pool * scores[i] / total), full - ranks[i]) for i in room}
        if not any(grants.values()):
            grants = dict.fromkeys(sorted(room, key=lambda i: -scores[i])[:pool], 1)
        for i, grant in grants.items():
            ranks[i] += grant
            pool -= grant
        room = [i for i in room if ranks[i] < full]
    return ranks


def scaled(influence: Mapping[int, float]) -> dict[int, float]:
    """Return influences moved and stretched to [1, 2]; all 1 where they are equal."""
    low, high = min(influence.values()), max(influence.values())
    return {block: (value - low) / (high - low) + 1 if high > low else 1.0 for block, value in influence.items()}
