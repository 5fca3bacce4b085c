"""How many experts every mixture of a model keeps, and the plan that says so."""

import math
from collections.abc import Mapping, Sequence

from torch import nn
from transformers import PreTrainedModel

from pared.errors import ParedError
from pared.models.resized import resized
from pared.schema.plan import Plan, SitePlan, Uncovered
from pared.schema.width import Width, ranges_of
from pared.structure import Anatomy
from pared.structure.mixture import Mixture, mixtures_by_shape, with_picks


def count_of(mixtures: Sequence[Mixture], keep: float) -> int:
    """Return how many experts stay in every mixture.

    Raises:
        ParedError: mixtures have different numbers of them, or fewer would stay than a token is given to, if that is
            known.
    """
    numbers = sorted({one.experts for one in mixtures})
    if len(numbers) > 1:
        raise ParedError(
            f"structures experts: layers have {' and '.join(map(str, numbers))} experts, expected one number "
            "everywhere, as one number in the configuration says how many stay"
        )
    experts, picked = numbers[0], max(one.picked for one in mixtures)
    count = experts_kept(experts, keep)
    if count < picked:
        raise ParedError(f"keep {keep:g} leaves {count} of {experts} experts, and each token is given to {picked}; the "
                         f"least keep is {math.ceil(picked / experts * 1e4) / 1e4:g}")  # fmt: skip
    return count


def experts_kept(experts: int, keep: float) -> int:
    """Return how many of a mixture's experts a budget leaves, at least 1."""
    return max(1, int(experts * keep + 1e-9))


def expert_plan(
    anatomy: Anatomy,
    mixtures: Sequence[Mixture],
    count: int,
    keep: float,
    bytes_per_parameter: int,
    kept: Mapping[str, Sequence[int]] | None = None,
) -> Plan:
    """Return the plan of a model whose mixtures lose experts.

    Args:
        anatomy: of the model.
        mixtures: of it.
        count: experts that stay in each.
        keep: the fraction that was asked for.
        bytes_per_parameter: of the dtype the model is saved in.
        kept: which stay, by the name of the mixture, once that is known.
    """
    sites = tuple(
        SitePlan(
            name=stack.name,
            kind=f"router {stack.kind}" if stack in mixture.router else stack.kind,
            block=mixture.block,
            out_features=mixture.experts * stack.rows,
            in_features=stack.columns,
            decision=Width(
                group=mixture.name,
                side="out",
                width=count,
                channels=mixture.experts,
                rows=stack.rows,
                unit="expert",
                kept=ranges_of(kept[mixture.name]) if kept else None,
            ),
        )
        for mixture in mixtures
        for stack in mixture.stacks
        if stack.parameter
    )
    names = {site.name for site in sites}
    left = [
        Uncovered(
            name=site.name,
            shape=(site.out_features, site.in_features),
            parameters=site.out_features * site.in_features,
            reason="experts alone are taken out",
        )
        for site in anatomy.sites
        if f"{site.name}.weight" not in names
    ]
    return Plan(
        keep=keep,
        sites=sites,
        uncovered=(*left, *(one for one in anatomy.uncovered if one.name not in names)),
        model_parameters=anatomy.model_parameters,
        bytes_per_parameter=bytes_per_parameter,
    )


def plan_of_shapes(model: PreTrainedModel, anatomy: Anatomy, keep: float, bytes_per_parameter: int) -> Plan:
    """Return the plan of a model from shapes alone; which experts stay is not in it.

    Raises:
        ParedError: there are no mixtures, they have different numbers of experts, or fewer would stay than a token is
            given to.
    """
    mixtures = mixtures_by_shape(anatomy.blocks(model), anatomy)
    if not mixtures:
        raise ParedError(no_mixtures(model))
    shapes = model if model.device.type == "meta" else resized(model, {})
    count = count_of(mixtures if shapes is None else with_picks(shapes, mixtures), keep)
    return expert_plan(anatomy, mixtures, count, keep, bytes_per_parameter)


def no_mixtures(model: nn.Module) -> str:
    """Return what to say of a model that has none."""
    return (
        f"structures experts: {type(model).__name__} has no mixtures of experts, which are tensors of three dimensions "
        "with a router beside them; take ranks or widths"
    )
