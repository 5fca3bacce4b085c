"""Decisions put together to the plan of a whole model, from shapes alone or from evidence."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

import torch
from transformers import PreTrainedModel

from pared.allocation import Allocator, Budget, Evidence, Unit, allocator_of
from pared.allocation.ranks.predicted import predicted_loss
from pared.allocation.sparsity import mixture
from pared.engine.spec import CompressionSpec, ExpertSpec, LowRankSpec, SparseSpec
from pared.engine.targets.expert_plan import plan_of_shapes
from pared.engine.targets.grouping import candidate_units
from pared.engine.targets.opening import opened_shapes, patterns_of
from pared.errors import ParedError
from pared.memory import parse_size
from pared.schema.bits import FORMS, Form, InFewBits
from pared.schema.options import Options
from pared.schema.plan import NM, Decision, Dense, LowRank, Plan, Shared, SitePlan, Sparse
from pared.schema.recipe import Recipe
from pared.structure import Anatomy, find_anatomy, probe
from pared.structure.probe import probe_shapes


def anatomy_of(model: PreTrainedModel, recipe: Recipe) -> Anatomy:
    """Return the sites that a recipe targets, from shapes alone; of experts, those that are open.

    Raises:
        ParedError: no such blocks, no linear layer in them, or nothing is left of them.
    """
    anatomy = find_anatomy(model, recipe.blocks)
    return anatomy.without(patterns_of(model, recipe, [site.name for site in anatomy.sites]))


def plan_from_shapes(model: PreTrainedModel, spec: CompressionSpec, bytes_per_parameter: int | None = None) -> Plan:
    """Decide every site from shapes alone; the model may be on the meta device, and is not changed.

    Experts that the compression opens are sites. Where ranks or zeros depend on the data, those of uniform allocation
    stand in: the sizes are right to a rank.

    Raises:
        ParedError: nothing to compress, or a budget too small.
    """
    itemsize, model = bytes_per_parameter or model.dtype.itemsize, opened_shapes(model, spec)
    anatomy = anatomy_of(model, spec.recipe)
    if isinstance(spec, ExpertSpec):
        return plan_of_shapes(model, anatomy, spec.recipe.keep, itemsize)
    if isinstance(spec, SparseSpec):
        sites = [Unit((site,)) for site in anatomy.sites]
        uniform = {unit.name: Sparse(sparsity=spec.sparsity) for unit in sites}
        return plan_zeros(anatomy, spec, sites, uniform, itemsize)
    allocator, config = spec.allocator, spec.allocation_config
    budget = budget_of(spec, anatomy, itemsize)
    if budget.of_bytes:
        return _stand_in(anatomy, budget, itemsize)
    if spec.decided_from_data:
        allocator = allocator_of("uniform", "low_rank")
        config = allocator.configured()
    grouped = None
    # What is measured is not known from shapes: each weight alone.
    if spec.sharing in ("paper", "all"):
        anatomy = probe_shapes(model, anatomy) if model.device.type == "meta" else probe(model, anatomy, read=False)[0]
        grouped = candidate_units(anatomy, spec.group_size, spec.sharing)
    # Channels are proved by what the blocks compute, which shapes do not tell.
    budget = replace(budget, structures="ranks")
    return make_plan(anatomy, allocator, budget, itemsize, grouped, config=config)


def budget_of(spec: LowRankSpec, anatomy: Anatomy, itemsize: int) -> Budget:
    """Return the budget of a spec on a model: of bytes the fraction that is left of its target modules'.

    Raises:
        ParedError: what is not targeted has as many bytes as there are to be in all.
    """
    recipe = spec.recipe
    if not recipe.of_bytes:
        return spec.budget
    if recipe.keep_bytes is not None:
        return replace(spec.budget, keep=recipe.keep_bytes, itemsize=itemsize)
    wanted = parse_size(recipe.target_bytes or "", "target_bytes")
    covered = sum(site.out_features * site.in_features for site in anatomy.sites) * itemsize
    others = anatomy.model_parameters * itemsize - covered
    if wanted <= others:
        raise ParedError(f"target bytes {wanted:,}: what is not a target module has {others:,} bytes, which stay; name "
                         "more")  # fmt: skip
    return replace(spec.budget, keep=min((wanted - others) / covered, 1.0), itemsize=itemsize)


def _stand_in(anatomy: Anatomy, budget: Budget, itemsize: int) -> Plan:
    """Return a plan of about the bytes of a budget: everything in the largest form that fits, or in the smallest."""
    whole = Dense(reason="stands for what the text decides")
    plan = whole_plan(anatomy, 1.0, {site.name: whole for site in anatomy.sites}, itemsize)
    plan = plan.model_copy(update={"keep_bytes": budget.keep})
    limit = budget.keep * budget.size(plan.before.covered_parameters)
    for form in (None, *FORMS):
        tried = with_form(plan, form)
        if sum(site.stored_bytes(itemsize) for site in tried.sites) <= limit:
            break
    return tried


def whole_plan(anatomy: Anatomy, keep: float, decisions: Mapping[str, Decision], bytes_per_parameter: int) -> Plan:
    """Return the plan of a model.

    Args:
        anatomy: its sites.
        keep: the fraction of the sites' parameters that was requested to stay.
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
    anatomy: Anatomy,
    allocator: Allocator,
    budget: Budget,
    bytes_per_parameter: int,
    units: Sequence[Unit] | None = None,
    evidence: Evidence | None = None,
    config: Options | None = None,
) -> Plan:
    """Decide the rank of every site.

    Args:
        anatomy: of the model; from shapes alone, or after the probe pass.
        allocator: of ranks.
        budget: the fraction of the sites' parameters that stays, and what a rank costs.
        bytes_per_parameter: of the dtype the model is saved in.
        units: the sites, alone or in groups that share a basis; each alone if none are given.
        evidence: for an allocator that requires more than shapes.
        config: options of the allocator; the defaults if none are given.

    Raises:
        ParedError: the budget leaves a unit without a rank.
    """
    units = [Unit((site,)) for site in anatomy.sites] if units is None else units
    decisions = allocator.allocate(units, budget, evidence or Evidence(), config)
    by_site = {site.name: _of_member(unit, decisions[unit.name]) for unit in units for site in unit.members}
    plan = with_form(whole_plan(anatomy, budget.keep, by_site, bytes_per_parameter), budget.form)
    # A budget of ranks or bytes asks for no number of parameters: what comes out is what was asked for.
    if budget.rank_fraction is None and not budget.of_bytes:
        return plan
    of_bytes = {"keep_bytes": budget.keep} if budget.of_bytes else {}
    return plan.model_copy(update={"keep": min(plan.achieved_keep, 1.0), **of_bytes})


@dataclass(frozen=True)
class Allocated:
    """A budget spread over a model.

    Attributes:
        plan: every site's decision.
        loss: what it is predicted to add to the loss, nats a token.
    """

    plan: Plan
    loss: float


@dataclass(frozen=True)
class Budgets:
    """Every budget of what was decomposed once.

    Attributes:
        anatomy: of the model.
        units: what gets a decision.
        evidence: what is known of them.
        allocator: that spreads a budget.
        config: its options.
        budget: what a rank costs; how much stays is not read.
        itemsize: bytes of a number of the dtype the model is saved in.
    """

    anatomy: Anatomy
    units: Sequence[Unit]
    evidence: Evidence
    allocator: Allocator
    config: Options
    budget: Budget
    itemsize: int

    def decide(self, keep: float) -> Allocated:
        """Spread a budget.

        Args:
            keep: the fraction of the target parameters that stays, in (0, 1).

        Raises:
            ParedError: it cannot be met.
        """
        budget = replace(self.budget, keep=keep)
        plan = make_plan(self.anatomy, self.allocator, budget, self.itemsize, self.units, self.evidence, self.config)
        decisions = {site.name: site.decision for site in plan.sites}
        return Allocated(plan, predicted_loss(self.units, decisions, budget, self.evidence))


def with_form(plan: Plan, form: Form | None) -> Plan:
    """Return a plan whose sites are all stored in a form; the plan itself if there is none."""
    if form is None:
        return plan

    def stored(site: SitePlan) -> SitePlan:
        if not isinstance(site.decision, InFewBits):
            return site
        return site.model_copy(update={"decision": site.decision.model_copy(update={"quantized": form})})

    return plan.model_copy(update={"sites": tuple(stored(site) for site in plan.sites)})


def _of_member(unit: Unit, decision: Decision) -> Decision:
    """Return what a unit's decision is for each of its sites."""
    if isinstance(decision, LowRank) and len(unit.members) > 1:
        return Shared(rank=decision.rank, owner=unit.name, pivoted=decision.pivoted)
    return decision


def plan_zeros(
    anatomy: Anatomy,
    spec: SparseSpec,
    units: Sequence[Unit],
    wished: Mapping[str, Decision],
    bytes_per_parameter: int,
    dense: Mapping[str, str] = MappingProxyType({}),
) -> Plan:
    """Decide every site from what its unit is given.

    With a pattern every unit gets a whole number of every M, so that the mean comes as close as it can.

    Args:
        anatomy: of the model.
        spec: its sparsity, and its pattern if it has one.
        units: the sites that get one sparsity.
        wished: the sparsity of every unit, by name.
        bytes_per_parameter: of the dtype the model is saved in.
        dense: sites that stay dense, and why, beside those that no token reached.

    Raises:
        ParedError: a site's inputs are no multiple of M; names it.
    """
    decisions: dict[str, Decision] = {}
    if spec.pattern is None:
        decisions |= {site.name: wished[unit.name] for unit in units for site in unit.members}
    else:
        asked = spec.pattern
        sizes_L = torch.tensor([unit.parameters for unit in units])
        found = [one.sparsity for unit in units if isinstance(one := wished[unit.name], Sparse)]
        sparsities_L = torch.tensor(found, dtype=torch.float64)
        mixed = mixture(sparsities_L, asked.group, asked.sparsity, sizes_L)
        for unit, removed in zip(units, mixed.removed, strict=True):
            kept = asked.group - removed
            whole = Dense(reason=f"keeps {asked.group} of every {asked.group}")
            decisions |= {site.name: NM(kept=kept, group=asked.group) if removed else whole for site in unit.members}
        for site in anatomy.sites:
            if site.in_features % asked.group:
                raise ParedError(f"pattern {asked}: site {site.name} has {site.in_features} inputs, expected a "
                                 f"multiple of {asked.group}; skip it, or name another pattern")  # fmt: skip
    unreached = {
        site.name: "no token reached it; nothing is known about its inputs" for site in anatomy.sites if site.idle
    }
    decisions |= {name: Dense(reason=why) for name, why in (unreached | dict(dense)).items()}
    return whole_plan(anatomy, 1 - spec.sparsity, decisions, bytes_per_parameter)
