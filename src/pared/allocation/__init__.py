"""How much each weight may keep: from units and a budget to decisions; one file per allocator."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from pared.allocation.program.packaged import DEFAULT_OF_RANKS
from pared.allocation.rank_fraction import rank_fraction
from pared.allocation.units import Budget, Evidence, Unit
from pared.allocation.whole import whole_plan
from pared.errors import ParedError
from pared.lazy import deferred
from pared.names import require_known
from pared.plan import Decision, LowRank, Plan, Shared

if TYPE_CHECKING:
    from pared.anatomy.structure import Anatomy


Allocate = Callable[[Sequence[Unit], Budget, Evidence], dict[str, Decision]]


@dataclass(frozen=True)
class Allocator:
    """A way to spread a budget.

    Attributes:
        name: what a recipe calls it.
        summary: what it does, in a line.
        allocate: from units, a budget and the evidence to decisions by unit.
        needs: fields of the evidence it reads; shapes are enough if there are none.
        options: names and default values.
    """

    name: str
    summary: str
    allocate: Allocate
    needs: frozenset[str] = frozenset({"spectra"})
    options: Mapping[str, bool | int | float | str] = field(default_factory=dict)


def _rank_fraction(units: Sequence[Unit], budget: Budget, _: Evidence) -> dict[str, Decision]:
    if budget.rank_fraction is None:
        raise ParedError("allocation rank-fraction needs the fraction; give rank_fraction (--rank-fraction) instead")
    return rank_fraction(units, budget.rank_fraction, budget.pivoted)


def _in(module: str) -> Allocate:
    """Return the allocator of a module, which has its name."""
    return deferred(f"{__name__}.{module}:{module}")


ALLOCATORS = {
    allocator.name: allocator
    for allocator in (
        Allocator("uniform", "the same fraction of every weight", _in("uniform"), frozenset()),
        Allocator("rank-fraction", "FWSVD's budget, the same fraction of every rank", _rank_fraction, frozenset()),
        Allocator(
            "loss",
            "the least sum of losses over all weights, dense ones included",
            _in("loss"),
        ),
        Allocator(
            "effective-rank",
            "D-Rank: by effective rank, with a share of q and k moved to v",
            _in("effective_rank"),
        ),
        Allocator(
            "swift",
            "Swift-SVD: by loss and influence of the block, eleven mixtures tried on a text",
            _in("swift"),
            frozenset({"spectra", "influence", "trial"}),
        ),
        Allocator(
            "sensitivity",
            "ASVD: every weight at six sizes, by the perplexity each leaves; many evaluations, kept on disk",
            _in("sensitivity"),
            frozenset({"spectra", "trial"}),
        ),
        Allocator(
            "dsa",
            "a DSA program over the spectra of a block: its text, FOUND.json of a search, or a packaged one",
            deferred("pared.allocation.by_program:dsa"),
            frozenset({"spectra", "options"}),
            {"program": DEFAULT_OF_RANKS, "score_tokens": 0},
        ),
        Allocator(
            "svd-llm-v2",
            "within a kind, less is taken where uniform ranks lose more",
            _in("svd_llm_v2"),
        ),
    )
}


def allocator_of(name: str) -> Allocator:
    """Return the allocator of a name.

    Raises:
        ParedError: there is none.
    """
    require_known("allocation", name, ALLOCATORS)
    return ALLOCATORS[name]


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


__all__ = ["ALLOCATORS", "Allocator", "Budget", "Evidence", "Unit", "allocator_of", "make_plan"]
