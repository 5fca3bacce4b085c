"""Plans of zeros: from a recipe's sparsity or pattern, and what an allocator says, to every site's decision."""

from collections.abc import Sequence

import torch

from pared.allocation.sparsity import mixture
from pared.engine.allocate import whole_plan
from pared.engine.spec import pattern_of
from pared.errors import ParedError
from pared.schema.plan import NM, Decision, Dense, Plan, Sparse
from pared.schema.recipe import Recipe
from pared.structure import Anatomy, Site


def target_of(recipe: Recipe) -> float:
    """Return the fraction of zeros that a pruning recipe asks for.

    Raises:
        ParedError: the pattern does not exist.
    """
    if recipe.pattern is None:
        assert recipe.sparsity is not None
        return recipe.sparsity
    return pattern_of(recipe.pattern).sparsity


def uniform_zeros(anatomy: Anatomy, recipe: Recipe, bytes_per_parameter: int) -> Plan:
    """Give every site the recipe's own sparsity or pattern, from shapes alone."""
    units = [[site] for site in anatomy.sites]
    wished = torch.full((len(units),), target_of(recipe), dtype=torch.float64)
    return plan_zeros(anatomy, recipe, units, wished, bytes_per_parameter)


def plan_zeros(
    anatomy: Anatomy,
    recipe: Recipe,
    units: Sequence[Sequence[Site]],
    sparsities_L: torch.Tensor,
    bytes_per_parameter: int,
) -> Plan:
    """Decide every site from the sparsities of units.

    With a pattern every unit gets a whole number of every M, so that the mean comes as close as it can.

    Args:
        anatomy: of the model.
        recipe: its pattern, if it has one.
        units: the sites that get one sparsity.
        sparsities_L: of every unit.
        bytes_per_parameter: of the dtype the model is saved in.

    Raises:
        ParedError: a site's inputs are no multiple of M; names it.
    """
    decisions: dict[str, Decision] = {}
    if recipe.pattern is None:
        for unit, sparsity in zip(units, sparsities_L.tolist(), strict=True):
            decisions |= {site.name: Sparse(sparsity=sparsity) for site in unit}
    else:
        asked = pattern_of(recipe.pattern)
        sizes_L = torch.tensor([sum(s.out_features * s.in_features for s in unit) for unit in units])
        mixed = mixture(sparsities_L, asked.group, asked.sparsity, sizes_L)
        for unit, removed in zip(units, mixed.removed, strict=True):
            kept = asked.group - removed
            whole = Dense(reason=f"keeps {asked.group} of every {asked.group}")
            decisions |= {site.name: NM(kept=kept, group=asked.group) if removed else whole for site in unit}
        for site in anatomy.sites:
            if site.in_features % asked.group:
                raise ParedError(f"pattern {asked}: site {site.name} has {site.in_features} inputs, expected a "
                                 f"multiple of {asked.group}; skip it, or name another pattern")  # fmt: skip
    for site in anatomy.sites:
        if site.idle:
            decisions[site.name] = Dense(reason="no token reached it; nothing is known about its inputs")
    return whole_plan(anatomy, 1 - target_of(recipe), decisions, bytes_per_parameter)
