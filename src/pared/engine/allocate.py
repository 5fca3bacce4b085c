"""Decisions put together to the plan of a whole model, from shapes alone or from evidence."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, cast

from pared.allocation import Budget, Evidence, Unit, allocator_of
from pared.engine.spec import (
    allocation_of,
    anatomy_of,
    budget_of,
    is_pruning,
    layer_allocation_of,
    options_of,
    rank_options_of,
)
from pared.schema.plan import Decision, LowRank, Plan, Shared, SitePlan
from pared.schema.recipe import Recipe

if TYPE_CHECKING:  # what a plan by shapes alone lacks is refused without torch
    from transformers import PreTrainedModel

    from pared.structure import Anatomy


def whole_plan(anatomy: "Anatomy", keep: float, decisions: Mapping[str, Decision], bytes_per_parameter: int) -> Plan:
    """Return the plan of a model.

    Args:
        anatomy: its sites.
        keep: the fraction of covered parameters that was asked to stay.
        decisions: by the name of the site.
        bytes_per_parameter: of the dtype the model is saved in.
    """
    return Plan(
        keep=keep,
        sites=tuple(
            SitePlan(
                name=site.name,
                kind=site.kind,
                block=site.block,
                out_features=site.out_features,
                in_features=site.in_features,
                decision=decisions[site.name],
            )
            for site in anatomy.sites
        ),
        uncovered=anatomy.uncovered,
        model_parameters=anatomy.model_parameters,
        bytes_per_parameter=bytes_per_parameter,
    )


def make_plan(
    anatomy: "Anatomy",
    allocation: str,
    budget: Budget,
    bytes_per_parameter: int,
    units: Sequence[Unit] | None = None,
    evidence: Evidence | None = None,
) -> Plan:
    """Decide every site.

    Args:
        anatomy: of the model; from shapes alone, or after the probe pass.
        allocation: name of the allocator.
        budget: the fraction of the covered parameters that stays, and what a rank costs.
        bytes_per_parameter: of the dtype the model is saved in.
        units: the sites, alone or in groups that share a basis; each alone if none are given.
        evidence: for an allocator that needs more than shapes.

    Raises:
        ParedError: unknown allocator, or the budget leaves a unit without a rank.
    """
    units = [Unit((site,)) for site in anatomy.sites] if units is None else units
    decisions = allocator_of(allocation).allocate(units, budget, evidence or Evidence())
    by_site = {site.name: _of_member(unit, decisions[unit.name]) for unit in units for site in unit.members}
    plan = whole_plan(anatomy, budget.keep, by_site, bytes_per_parameter)
    # A budget of ranks asks for no number of parameters: what comes out is what was asked for.
    return plan if budget.rank_fraction is None else plan.model_copy(update={"keep": min(plan.achieved_keep, 1.0)})


def _of_member(unit: Unit, decision: Decision) -> Decision:
    """Return what a unit's decision is for each of its sites."""
    if isinstance(decision, LowRank) and len(unit.members) > 1:
        return Shared(rank=decision.rank, owner=unit.name, pivoted=decision.pivoted)
    return decision


def decided_from_data(recipe: Recipe) -> bool:
    """Whether more than shapes decides what every site keeps, so that :func:`plan_of` can only stand in."""
    if is_pruning(recipe):
        return bool(layer_allocation_of(recipe)[0].needs)
    return bool(allocator_of(allocation_of(recipe)).needs)


def plan_of(model: "PreTrainedModel", recipe: Recipe, bytes_per_parameter: int | None = None) -> Plan:
    """Decide every site from shapes alone; the model may be on the meta device.

    Where ranks or zeros depend on the data, those of uniform allocation stand in: the sizes are right to a rank.

    Raises:
        ParedError: unknown method or allocation, nothing to compress, or a budget too small.
    """
    from pared.engine.grouping import candidate_units
    from pared.engine.zeros import uniform_zeros
    from pared.structure.probe import probe, probe_shapes

    options = options_of(recipe)
    if is_pruning(recipe):
        layer_allocation_of(recipe)
        anatomy = anatomy_of(model, recipe)
        return uniform_zeros(anatomy, recipe, bytes_per_parameter or model.dtype.itemsize)
    allocation = allocation_of(recipe)
    rank_options_of(recipe)
    by_shape = "uniform" if allocator_of(allocation).needs else allocation
    anatomy = anatomy_of(model, recipe)
    units = None
    if options.get("sharing") in ("paper", "all"):  # what is measured is not known from shapes: each weight alone
        anatomy = probe_shapes(model, anatomy) if model.device.type == "meta" else probe(model, anatomy, read=False)[0]
        units = candidate_units(anatomy, cast("int", options["group_size"]), str(options["sharing"]))
    return make_plan(anatomy, by_shape, budget_of(recipe), bytes_per_parameter or model.dtype.itemsize, units)
