"""A decision for every site, put together to the plan of a whole model."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from pared.plan import Decision, Plan, SitePlan

if TYPE_CHECKING:
    from pared.anatomy import Anatomy


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
