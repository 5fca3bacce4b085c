"""How much each site may keep: from sites and a budget to decisions; one file per allocator."""

from collections.abc import Callable, Sequence

from pared.allocation.uniform import uniform
from pared.anatomy.structure import Anatomy, Site
from pared.errors import ParedError
from pared.names import did_you_mean
from pared.plan import Decision, Plan, SitePlan

ALLOCATORS: dict[str, Callable[[Sequence[Site], float], dict[str, Decision]]] = {"uniform": uniform}


def make_plan(anatomy: Anatomy, allocation: str, keep: float, bytes_per_parameter: int) -> Plan:
    """Decide every site.

    Args:
        anatomy: of the model; from shapes alone, or after the probe pass.
        allocation: name of the allocator.
        keep: fraction of the covered parameters that stays.
        bytes_per_parameter: of the dtype the model is saved in.

    Raises:
        ParedError: unknown allocator, or the budget leaves a site without a rank.
    """
    if allocation not in ALLOCATORS:
        raise ParedError(f"unknown allocation {allocation!r}; {did_you_mean(allocation, ALLOCATORS)}")
    decisions = ALLOCATORS[allocation](anatomy.sites, keep)
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


__all__ = ["ALLOCATORS", "make_plan", "uniform"]
