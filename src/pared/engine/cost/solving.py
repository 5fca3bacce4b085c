"""What is made of statistics: decompositions, factors, targets, refits and zeros."""

from collections.abc import Sequence
from dataclasses import replace

from pared.calibration.statistics import statistic_kind
from pared.engine.cost.channels import cut, order
from pared.engine.cost.passes import Shapes, Work, update_kind
from pared.engine.cost.sizes import decomposition_bytes
from pared.engine.spec import CompressionSpec, LowRankSpec, PassSpec
from pared.engine.targets.grouping import candidate_units
from pared.lowrank.operations import factors
from pared.operations import Operation, product
from pared.schema.plan import Dense, SitePlan
from pared.structure import Site


class NotDeclaredError(Exception):
    """A method does not declare how many operations it takes."""


def solve(work: Work, step: PassSpec) -> list[Operation]:
    """Return what is solved in a step, of either family.

    Raises:
        NotDeclaredError: the method does not say what it takes.
    """
    if isinstance(work.spec, LowRankSpec):
        return _decompose(work, work.spec, step)
    return [one for _, shapes in _by_input(work) for one in (*_solved(work, shapes), *_packed(shapes))]


def realize(work: Work, from_disk: bool = False) -> list[Operation]:
    """Return what the factors of every site that is given a rank take.

    Args:
        work: with the plan.
        from_disk: whether decompositions have waited there.
    """
    found, sites = list[Operation](), {site.name: site for site in work.anatomy.sites}
    itemsize = work.model.dtype.itemsize
    for site in work.plan.sites:
        if (rank := _rank(site)) is None:
            continue
        out, width = site.out_features, site.in_features
        if from_disk and isinstance(work.spec, LowRankSpec):
            size = decomposition_bytes(sites[site.name], work.spec, itemsize)
            found += [Operation("read", (size,), "bytes"), Operation("stream", (size // 2,), "float64")]
        found += factors((out, width), rank, work.spec.config)
        if getattr(site.decision, "pivoted", False):
            found.append(Operation("pivot", (rank, width, out)))
    return [*found, *(one for group in work.channels if from_disk for one in cut(group, work.plan))]


def refit(work: Work) -> list[Operation]:
    """Return the least squares of every site's coefficients."""
    found, planned = list[Operation](), {site.name: site for site in work.plan.sites}
    for together, _ in _by_input(work):
        width = together[0].in_features
        found += [Operation("mirror", (width,)), Operation("stream", (8 * width**2,), "float64")]
        for site in together:
            if (rank := _rank(planned[site.name])) is None:
                continue
            out = site.out_features
            found += [product(rank, width, width), product(rank, width, rank), product(out, width, width),
                      product(out, width, rank), *[product(out, rank, rank)] * 3, Operation("solve", (rank, out)),
                      Operation("stream", (12 * out * width,), "float32")]  # fmt: skip
    return found


def _packed(shapes: Shapes) -> list[Operation]:
    return [Operation("pack", shape) for shape in shapes]


def _by_input(work: Work) -> list[tuple[list[Site], Shapes]]:
    """Return the sites that read one tensor, of all blocks, with their shapes."""
    found: list[tuple[list[Site], Shapes]] = []
    for index in sorted({site.block for site in work.anatomy.sites}):
        for together in work.readers(index):
            found.append((together, [(site.out_features, site.in_features) for site in together]))
    return found


def _solved(work: Work, shapes: Shapes) -> list[Operation]:
    """Return what the statistics and the solutions of the weights that read one tensor take."""
    method = work.spec.method
    if method.operations is None:
        raise NotDeclaredError(method.name)
    return [*_values(work.spec, shapes), *method.operations(shapes, work.spec.config)]


def _decompose(work: Work, spec: LowRankSpec, step: PassSpec) -> list[Operation]:
    """Return decompositions, alone and together, and what is kept or put in place of them."""
    if spec.method.operations is None:  # what puts channels in order is then not known either
        raise NotDeclaredError(spec.method.name)
    shares = spec.method.shares and spec.sharing != "none" and spec.group_size > 1
    units = candidate_units(work.anatomy, spec.group_size, spec.sharing) if shares else []
    closing = {unit.members[-1].name: len(unit.members) for unit in units if len(unit.members) > 1}
    grouped = {site.name for unit in units if len(unit.members) > 1 for site in unit.members}
    found: list[Operation] = []
    for group in work.channels:
        found += order(group, spec, work.plan, step)
        if step.reference:
            found += _aimed(group.consumer.out_features, group.channels)
    ranked = spec.structures != "widths"
    for together, shapes in _by_input(work) if ranked else ():
        alone = _solved(work, shapes)
        compared = all(site.name in grouped for site in together) and spec.method.losses is not None
        found += [replace(one, kind="eigenvalues") if compared and "eigh" in one.kind else one for one in alone]
        if step.reference:
            found += [one for out, width in shapes for one in _aimed(out, width)]
        last = [site for site in together if site.name in closing]
        if last and not step.installs:
            found += _together(work, [closing[site.name] for site in last], last)
    if step.installs:
        return found + realize(work)
    itemsize = work.model.dtype.itemsize
    kept = sum(decomposition_bytes(site, spec, itemsize) for site in work.anatomy.sites if ranked)
    return [*found, Operation("write", (kept,), "bytes")]


def _together(work: Work, members: Sequence[int], sites: Sequence[Site]) -> list[Operation]:
    """Return the decomposition of groups as one, and the comparison with their members apart."""
    assert work.spec.method.operations is not None
    shapes = [(count * site.out_features, site.in_features) for count, site in zip(members, sites, strict=True)]
    found, width = list(work.spec.method.operations(shapes, work.spec.config)), sites[0].in_features
    found.append(Operation("stream", (3 * max(members) * width**2,), "float64"))  # the mean of their Grams
    for (out, _), count in zip(shapes, members, strict=True):
        rank, alone = max(1, min(out, width) // 2), out // count
        if out > width:  # the errors of the members, by their own Grams
            found += [product(rank, width, width), product(width, rank, width)]
            found += [product(width, width, width)] * 2 * count
            found += [product(width, alone, width)] * (count if alone <= width else 0)
        else:
            found.append(product(rank, out, width))
            found += [product(alone, rank, width), product(alone, width, width)] * count
    return found


def _values(spec: CompressionSpec, shapes: Shapes) -> list[Operation]:
    """Return what reading the statistics of sites that read one tensor takes."""
    found: list[Operation] = []
    for name in sorted(spec.requires(shapes) | spec.gradients):
        if update_kind(name) == "gram":
            of_outputs = statistic_kind(name).of in ("output", "output_grad")
            widths = [out for out, _ in shapes] if of_outputs else [shapes[0][1]]
            found += [Operation("mirror", (width,)) for width in widths]
            found += [Operation("stream", (3 * width**2,), "float64") for width in widths]
    return found


def _aimed(out: int, width: int) -> list[Operation]:
    """Return what the target of a weight takes where the dense model runs alongside."""
    return [product(out, width, width), Operation("solve", (width, out)), Operation("mirror", (width,)),
            Operation("stream", (8 * width**2,), "float64")]  # fmt: skip


def _rank(site: SitePlan) -> int | None:
    return None if isinstance(site.decision, Dense) else getattr(site.decision, "rank", None)
