"""How much each site may keep: from sites and a budget to decisions; one file per allocator."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from pared.allocation.budget import Spectra
from pared.allocation.effective_rank import effective_rank
from pared.allocation.loss import loss
from pared.allocation.svd_llm_v2 import svd_llm_v2
from pared.allocation.uniform import uniform
from pared.anatomy.structure import Anatomy, Site
from pared.errors import ParedError
from pared.names import did_you_mean
from pared.plan import Decision, Plan, SitePlan


@dataclass(frozen=True)
class Allocator:
    """A way to spread a budget.

    Attributes:
        name: what a recipe calls it.
        summary: what it does, in a line.
        by_spectrum: whether it needs every site's decomposition first; if not, shapes are enough.
        allocate: from sites, the fraction to keep, and the spectra to decisions.
    """

    name: str
    summary: str
    by_spectrum: bool
    allocate: Callable[[Sequence[Site], float, Spectra], dict[str, Decision]]


ALLOCATORS = {
    allocator.name: allocator
    for allocator in (
        Allocator("uniform", "the same fraction of every site", False, lambda sites, keep, _: uniform(sites, keep)),
        Allocator("loss", "the least sum of losses over all sites, dense ones included", True, loss),
        Allocator(
            "effective-rank", "D-Rank: by effective rank, with a share of q and k moved to v", True, effective_rank
        ),
        Allocator("svd-llm-v2", "within a kind, less is taken where uniform ranks lose more", True, svd_llm_v2),
    )
}


def allocator_of(name: str) -> Allocator:
    """Return the allocator of a name.

    Raises:
        ParedError: there is none.
    """
    if name not in ALLOCATORS:
        raise ParedError(f"unknown allocation {name!r}; {did_you_mean(name, ALLOCATORS)}")
    return ALLOCATORS[name]


def make_plan(
    anatomy: Anatomy,
    allocation: str,
    keep: float,
    bytes_per_parameter: int,
    spectra: Mapping[str, torch.Tensor] | None = None,
) -> Plan:
    """Decide every site.

    Args:
        anatomy: of the model; from shapes alone, or after the probe pass.
        allocation: name of the allocator.
        keep: fraction of the covered parameters that stays.
        bytes_per_parameter: of the dtype the model is saved in.
        spectra: for an allocator that needs them, what leaving out each direction of every site costs.

    Raises:
        ParedError: unknown allocator, or the budget leaves a site without a rank.
    """
    decisions = allocator_of(allocation).allocate(anatomy.sites, keep, spectra or {})
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


__all__ = ["ALLOCATORS", "Allocator", "allocator_of", "make_plan", "uniform"]
