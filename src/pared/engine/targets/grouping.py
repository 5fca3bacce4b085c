"""Which sites may share a basis, and whether sharing pays."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from pared.allocation import Budget, Unit
from pared.lowrank import Decomposition
from pared.lowrank.sharing import errors
from pared.structure import Anatomy, Site


@dataclass(frozen=True)
class Comparison:
    """What a group loses with one basis and what its members lose with their own, at equal parameters.

    Attributes:
        name: of the group's first site.
        kind: what such a layer is usually called, to print.
        members: how many weights.
        shared_rank: of the one basis.
        apart_rank: of every member's own.
        shared: squared error of every member on its own inputs; weighted as the method weighs it.
        apart: the same with bases of their own.
        always: share whatever the comparison says.
    """

    name: str
    kind: str
    members: int
    shared_rank: int
    apart_rank: int
    shared: tuple[float, ...]
    apart: tuple[float, ...]
    always: bool = False

    @classmethod
    def of(cls, fields: Mapping[str, Any]) -> "Comparison":
        """Return the comparison of these fields, as they are or as they were in JSON."""
        own: dict[str, Any] = {**fields, "shared": tuple(fields["shared"]), "apart": tuple(fields["apart"])}
        return cls(**own)

    @property
    def ratio(self) -> float:
        """How much the error of a member grows by sharing, on average over the members.

        Not the ratio of the sums: blocks pass on outputs of very different size, and a sum would let the member with
        the largest pay for everything that the others lose.
        """
        ratios = [
            one / other if other else (math.inf if one else 1.0)
            for one, other in zip(self.shared, self.apart, strict=True)
        ]
        return sum(ratios) / len(ratios)

    @property
    def pays(self) -> bool:
        """Whether the basis is shared."""
        return self.always or self.ratio < 1


def candidate_units(anatomy: Anatomy, group_size: int, sharing: str) -> list[Unit]:
    """Return every site once: in groups over neighbouring blocks where it may share a basis, else alone.

    The first ``group_size`` blocks make the first groups, and so on; what remains makes a smaller last one. A group
    holds the same layer of every block, whatever its name: the same place in a module of the same class, and the same
    shape.

    Args:
        anatomy: of the model, with what its sites read.
        group_size: blocks in a group.
        sharing: ``paper`` groups what Basis Sharing's table shares; ``measured`` and ``all`` whatever
            :func:`may_share`; ``none`` nothing.
    """
    groups: dict[tuple[object, ...], list[Site]] = {}
    companions = companions_of(anatomy)
    numbers = _numbers(anatomy)
    for site in anatomy.sites:
        beside = companions[site.name]
        suits = in_the_table(site, beside) if sharing == "paper" else may_share(site, beside)
        alone = sharing == "none" or site.idle or not suits
        layer = (site.role, site.out_features, site.in_features)
        key = (site.name,) if alone else (layer, numbers[site.name], site.block // group_size)
        groups.setdefault(key, []).append(site)
    return [Unit(tuple(members)) for members in groups.values()]


def _numbers(anatomy: Anatomy) -> dict[str, int]:
    """Return which of a block's layers of one role and shape each is: of experts there are as many as experts.

    Layers that are no sites count too: one that is left alone in one block must not shift those behind it.
    """
    seen: Counter[tuple[object, ...]] = Counter()
    numbers: dict[str, int] = {}
    for layer in anatomy.layers:
        key = (layer.block, layer.role, layer.out_features, layer.in_features)
        numbers[layer.name] = seen[key]
        seen[key] += 1
    return numbers


def companions_of(anatomy: Anatomy) -> dict[str, list[Site]]:
    """Return for every layer those that read the same tensor first of all in its module, itself included.

    They are fed by the residual stream: q, k and v, gate and up. The list is empty for a site that reads something
    later, as o and down do.
    """
    first = {layer.parent: layer.reads for layer in anatomy.layers if layer.position == 0}
    groups: dict[str, list[Site]] = {}
    for layer in anatomy.layers:
        if first.get(layer.parent) == layer.reads:
            groups.setdefault(layer.parent, []).append(layer)
    fed = {layer.name: members for members in groups.values() for layer in members}
    return {layer.name: fed.get(layer.name, []) for layer in anatomy.layers}


def may_share(site: Site, companions: Sequence[Site]) -> bool:
    """Whether a shared basis is thought of: for what the residual stream feeds, the table's, and whatever widens.

    What o, down and fc2 read differs from block to block: an o of the embedded model loses 1.2 to 1.4 times as much
    with a shared basis at any budget, and the Gram of what feeds a down is the most expensive of all to collect.
    """
    return in_the_table(site, companions) or len(companions) > 1 or site.out_features > site.in_features


def in_the_table(site: Site, companions: Sequence[Site]) -> bool:
    """Whether Basis Sharing's table shares such a layer (the paper's section 4.1), by shape and what it reads.

    Of layers that read one tensor it shares those that are not narrowed: grouped-query k and v, less wide than both
    their input and q, stay private. A layer that alone is fed by the residual stream (fc1, fused projections) is wider
    than its input. GPT-2, whose weights are stored transposed, shares its square attention output too.
    """
    square_or_wider = site.out_features >= site.in_features
    if site.transposed and site.out_features == site.in_features:
        return True
    if len(companions) > 1:
        return square_or_wider or site.out_features == max(other.out_features for other in companions)
    return bool(companions) and site.out_features > site.in_features


def compare(
    unit: Unit,
    group: Decomposition,
    apart: Sequence[Decomposition],
    grams: Sequence[torch.Tensor],
    budget: Budget,
    always: bool,
) -> Comparison | None:
    """Compare one basis for a group with a basis for each, at equal parameters; None if either has no rank.

    Args:
        unit: the group.
        group: of the stacked weights.
        apart: of every member.
        grams: the Gram of every member's own input.
        budget: the fraction that is kept.
        always: share whatever the comparison says.
    """
    alone = [Unit((site,)) for site in unit.members]
    shared_rank, apart_rank = budget.rank(unit), budget.rank(alone[0])
    if shared_rank < 1 or apart_rank < 1:
        return None
    shared = errors(group, shared_rank, apart, grams)
    alone_errors = tuple(own.loss(apart_rank) ** 2 for own in apart)
    return Comparison(unit.name, unit.kind, len(unit.members), shared_rank, apart_rank, shared, alone_errors, always)


def told(comparisons: Sequence[Comparison]) -> list[str]:
    """Return one line for every kind of layer: how many groups share, and the ratio of the errors."""
    kinds: dict[str, list[Comparison]] = {}
    for one in comparisons:
        kinds.setdefault(one.kind, []).append(one)
    lines = []
    for kind, group in kinds.items():
        ratios = sorted(one.ratio for one in group)
        lines.append(
            f"{kind}: {sum(one.pays for one in group)} of {len(group)} groups share a basis; error shared / apart "
            f"{ratios[len(ratios) // 2]:.3f} ({ratios[0]:.3f} to {ratios[-1]:.3f})"
        )
    return lines
