"""One folder, every size: the largest one, and what the smaller ones take in place of what it stores dense.

Factors of a weight are nested: those of a rank are the first directions of those of every larger rank. So the largest
size holds every rank below its own, and what is dense in it needs factors beside it, up to the largest rank that any
smaller size gives it. Which rank that is the allocation itself says, budget by budget; and it is asked again, with the
spectra that lie beside the factors, when a size is cut out.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import nn

from pared.allocation import Budget, Evidence, Unit, allocator_of
from pared.engine.allocate import Allocated, Budgets
from pared.engine.install import factors_of, install_group
from pared.engine.ranks.kept_units import KeptUnits, ranks_of
from pared.errors import ParedError
from pared.lowrank import Factors
from pared.modules import LowRankLinear, PivotedLinear
from pared.progress import Progress
from pared.schema.elastic import Elastic, ElasticSite, ElasticSize, ElasticUnit
from pared.schema.plan import Dense, LowRank, Plan, Shared
from pared.structure import Anatomy, Site

STEPS = 100  # sizes are multiples of a hundredth


@dataclass(frozen=True)
class ElasticFactors:
    """What lies in a folder of every size beside its largest.

    Attributes:
        record: for the manifest.
        tensors: as :class:`pared.schema.elastic.Elastic` names them; factors in the dtype of their layer.
    """

    record: Elastic
    tensors: Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Cut:
    """A size.

    Attributes:
        plan: every site's decision.
        short: units that an allocation of all ranks would have left more than there are factors for.
    """

    plan: Plan
    short: tuple[str, ...] = ()


def collect(budgets: Budgets, largest: Plan, kept: KeptUnits, progress: Progress) -> ElasticFactors:
    """Return what every size below a plan takes: all multiples of 0.01 that a budget can be.

    Memory: the factors of what the plan leaves dense, in the dtype of the model.

    Args:
        budgets: of the model.
        largest: the plan that is put in place.
        kept: the decompositions, with the dense weights.
        progress: what reports progress.
    """
    quiet = replace(budgets, evidence=replace(budgets.evidence, notes={}))
    swept = _sweep(quiet, largest.keep, progress)
    held = {unit.name: _rank(largest, unit.name) for unit in budgets.units}
    ranks = dict(held)
    for _, one in swept:
        for name, decision in ranks_of(one.plan).items():
            ranks[name] = max(ranks[name], decision.rank)
    tensors: dict[str, torch.Tensor] = {}
    for unit in budgets.units:
        if (spectrum_R := budgets.evidence.cost.get(unit.name)) is None:
            continue
        tensors[f"{unit.name}.spectrum"] = spectrum_R.cpu()
        if (most := ranks[unit.name]) > (first := held[unit.name]):
            down_KN, up_OK = kept.factors(unit, most)
            tensors[f"{unit.name}.down"] = down_KN[first:].contiguous()
            tensors[f"{unit.name}.up"] = up_OK[:, first:].contiguous()
    in_nats = budgets.allocator.name == "loss"
    swept.insert(0, (largest.keep, Allocated(largest, budgets.decide(largest.keep).loss)))
    held_by_site = {site.name: (unit.name, ranks[unit.name]) for unit in budgets.units for site in unit.members}
    sizes = [ElasticSize(keep=keep, parameters=one.plan.after.covered_parameters, loss=one.loss if in_nats else None)
             for keep, one in swept if not _within(one.plan, largest, held_by_site).short]  # fmt: skip
    record = Elastic(
        allocation=budgets.allocator.name,
        options=budgets.config.model_dump(mode="json"),
        units=tuple(_described(unit, ranks[unit.name]) for unit in budgets.units),
        sizes=tuple(sizes),
        bytes=sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()),
    )
    return ElasticFactors(record, tensors)


def _sweep(budgets: Budgets, keep: float, progress: Progress) -> list[tuple[float, Allocated]]:
    """Return the allocations of all budgets below one, falling, down to the last that can be met."""
    keeps = [step / STEPS for step in range(STEPS - 1, 0, -1) if step / STEPS < keep]
    found = []
    with progress.stage("sizes", len(keeps), "size") as advance:
        for one in keeps:
            advance()
            try:
                found.append((one, budgets.decide(one)))
            except ParedError:
                break
    return found


def _described(unit: Unit, rank: int) -> ElasticUnit:
    sites = tuple(ElasticSite(name=s.name, owner=s.owner, position=s.position, reads=s.reads) for s in unit.members)
    return ElasticUnit(sites=sites, rank=rank)


def _rank(plan: Plan, name: str) -> int:
    decided = ranks_of(plan).get(name)
    return 0 if decided is None else decided.rank


def cut(elastic: Elastic, largest: Plan, spectra: Mapping[str, torch.Tensor], keep: float) -> Cut:
    """Decide every site at a smaller size.

    Args:
        elastic: what the folder holds.
        largest: its plan.
        spectra: of its units, by name.
        keep: the fraction of the target parameters that stays, at most the plan's.

    Raises:
        ParedError: it is smaller than the allocation can make it, or the allocation is no more there.
    """
    if keep == largest.keep:
        return Cut(largest)
    sites = {site.name: site for unit in elastic.units for site in _sites(unit, largest, unit.name not in spectra)}
    anatomy = Anatomy(
        "", tuple(sites[site.name] for site in largest.sites), largest.uncovered, (), largest.model_parameters
    )
    units = [Unit(tuple(sites[one.name] for one in unit.sites)) for unit in elastic.units]
    allocator = allocator_of(elastic.allocation, "low_rank")
    budgets = Budgets(anatomy, units, Evidence(spectra), allocator, allocator.configured(elastic.options),
                      Budget(keep), largest.bytes_per_parameter)  # fmt: skip
    held = {site.name: (unit.name, unit.rank) for unit in elastic.units for site in unit.sites}
    return _within(budgets.decide(keep).plan, largest, held)


def _sites(unit: ElasticUnit, plan: Plan, idle: bool) -> list[Site]:
    shapes = {site.name: site for site in plan.sites}

    def site(one: ElasticSite) -> Site:
        own = shapes[one.name]
        return Site(one.name, own.block, own.kind, own.out_features, own.in_features, False, one.reads, idle, one.owner,
                    one.position)  # fmt: skip

    return [site(one) for one in unit.sites]


def _within(plan: Plan, largest: Plan, held: Mapping[str, tuple[str, int]]) -> Cut:
    """Return what there are factors for of a plan: at most as much of every unit.

    What has no rank at any size is dense for the reason that it is in the largest.

    Args:
        plan: of a smaller size.
        largest: the plan of the largest.
        held: by site, the name of its unit and the largest rank that there are factors for.
    """
    before, short, sites = {site.name: site.decision for site in largest.sites}, dict[str, bool](), []
    for site in plan.sites:
        decision, own, (unit, most) = site.decision, before[site.name], held[site.name]
        if isinstance(decision, Dense) and isinstance(own, (LowRank, Shared)):
            short[unit], decision = True, own.model_copy(update={"rank": most})
        elif isinstance(decision, Dense) and not most:
            decision = own
        elif isinstance(decision, (LowRank, Shared)) and decision.rank > most:
            short[unit], decision = True, decision.model_copy(update={"rank": most})
        sites.append(site.model_copy(update={"decision": decision}))
    return Cut(plan.model_copy(update={"sites": tuple(sites)}), tuple(short))


def install_cut(
    model: nn.Module, largest: Plan, plan: Plan, more: Callable[[str], Factors | None], progress: Progress
) -> None:
    """Make a model of the largest size one of a smaller, in place.

    Args:
        model: of the largest size.
        largest: its plan.
        plan: of the smaller.
        more: returns the factors of a unit that the model does not have, by name.
        progress: what reports progress.

    Raises:
        ParedError: there are no factors of a unit that is to have some; the folder is damaged.
    """
    members = _members(plan)
    decided = ranks_of(plan)
    with progress.stage("factors", len(decided), "layer") as advance:
        for name, decision in decided.items():
            advance()
            if decision.rank != _rank(largest, name):
                factors = _held(model, members[name], _rank(largest, name), decision.rank, more(name))
                install_group(model, members[name], factors)


def _held(model: nn.Module, names: Sequence[str], first: int, rank: int, more: Factors | None) -> Factors:
    """Return the factors of a unit, the first directions of those that there are."""
    parts = [] if more is None else [more]
    if first:
        modules = [cast("LowRankLinear | PivotedLinear", model.get_submodule(name)) for name in names]
        parts.insert(0, factors_of(modules))
    there = sum(len(part.down) for part in parts)
    if there < rank:
        raise ParedError(f"{names[0]} is to have rank {rank}, and the folder holds factors of rank {there}; it is "
                         "damaged: fetch or make it again")  # fmt: skip
    down_KN = torch.cat([part.down for part in parts])[:rank]
    return Factors(down_KN, torch.cat([part.up for part in parts], dim=1)[:, :rank])


def _members(plan: Plan) -> dict[str, list[str]]:
    """Return the names of the sites that every unit with a rank has."""
    found: dict[str, list[str]] = {}
    for site in plan.sites:
        decision = site.decision
        if isinstance(decision, (LowRank, Shared)):
            found.setdefault(decision.owner if isinstance(decision, Shared) else site.name, []).append(site.name)
    return found
