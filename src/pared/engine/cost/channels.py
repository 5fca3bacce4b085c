"""What taking channels out of MLPs takes, and which layers they are by shapes alone."""

from collections.abc import Sequence

from pared.allocation import Evidence, allocator_of
from pared.allocation.units import Channels
from pared.engine.allocate import make_plan
from pared.engine.spec import CompressionSpec, LowRankSpec, PassSpec
from pared.operations import Operation, product
from pared.schema.plan import Plan
from pared.schema.width import Width
from pared.structure import Anatomy, Site
from pared.structure.groups import ChannelGroup, Producer
from pared.widths.operations import ordered, weight_that_reads


def groups_by_shape(anatomy: Anatomy, spec: CompressionSpec) -> tuple[ChannelGroup, ...]:
    """Return what a compression will probably find to be the channel groups; none where it decides no widths.

    They are proved by what blocks compute, which shapes do not tell. By shape a group is a layer that alone reads its
    tensor, and the one or two before it, which read as many features as it outputs and make one or two of its inputs
    each.

    Args:
        anatomy: with what its sites read.
        spec: of the compression.
    """
    if not isinstance(spec, LowRankSpec) or spec.structures == "ranks":
        return ()
    found = [_group(sites, place) for sites in _by_block(anatomy) for place in range(1, len(sites))]
    return tuple(group for group in found if group is not None)


def with_widths(plan: Plan, anatomy: Anatomy, spec: CompressionSpec, groups: tuple[ChannelGroup, ...]) -> Plan:
    """Return the plan with uniform widths of these groups, as widths depend on the data; the same plan without any.

    Raises:
        ParedError: widths alone are to be decided, and do not reach the budget.
    """
    if not groups or not isinstance(spec, LowRankSpec):
        return plan
    return uniform_widths(anatomy, spec, groups, plan.bytes_per_parameter)


def uniform_widths(
    anatomy: Anatomy, spec: LowRankSpec, groups: Sequence[ChannelGroup], bytes_per_parameter: int
) -> Plan:
    """Return the plan of uniform widths of these groups.

    Args:
        anatomy: of the model.
        spec: with a budget of widths.
        groups: what can become narrower.
        bytes_per_parameter: of the dtype the model is saved in.

    Raises:
        ParedError: widths alone are to be decided, and do not reach the budget.
    """
    evidence = Evidence(channels={group.name: Channels(group) for group in groups})
    uniform = allocator_of("uniform", "low_rank")
    return make_plan(anatomy, uniform, spec.budget, bytes_per_parameter, evidence=evidence)


def order(group: ChannelGroup, spec: LowRankSpec, plan: Plan, step: PassSpec) -> list[Operation]:
    """Return what putting a group's channels in order takes, and what is made or kept of it.

    Args:
        group: whose channels these are.
        spec: of the compression.
        plan: with the widths.
        step: the pass.
    """
    shape = (group.consumer.out_features, group.channels)
    width = _width(group, plan) if step.installs else 0
    if step.installs:
        return [*ordered(shape, spec.config, width), *weight_that_reads(shape, width)]
    kept = kept_bytes(group)
    copied = Operation("stream", (kept // 2,), "float32")
    return [*ordered(shape, spec.config), copied, Operation("write", (kept,), "bytes")]


def cut(group: ChannelGroup, plan: Plan) -> list[Operation]:
    """Return what making a group narrower takes, from what waits on the disk."""
    kept, shape = kept_bytes(group), (group.consumer.out_features, group.channels)
    read = [Operation("read", (kept,), "bytes"), Operation("stream", (kept // 2,), "float32")]
    return [*read, *weight_that_reads(shape, _width(group, plan))]


def kept_bytes(group: ChannelGroup) -> int:
    """Return what waits on the disk until widths are known: a factor in float32, an order and costs."""
    return 4 * group.channels**2 + 16 * group.channels


def narrow(sizes: tuple[int, int, int], decision: Width, dtype: str) -> Operation:
    """Return the product of a layer that lost inputs or outputs.

    Args:
        sizes: of what it was: tokens, inputs and outputs.
        decision: its width.
        dtype: computed in.
    """
    rows, read, out = sizes
    if decision.side == "in":
        return product(rows, decision.width, out, dtype)
    return product(rows, read, decision.rows * decision.width, dtype)


def _width(group: ChannelGroup, plan: Plan) -> int:
    decision = next(site.decision for site in plan.sites if site.name == group.name)
    return decision.width if isinstance(decision, Width) else group.channels


def _by_block(anatomy: Anatomy) -> list[list[Site]]:
    blocks = sorted({site.block for site in anatomy.sites})
    return [[site for site in anatomy.sites_of(index) if not site.idle] for index in blocks]


def _group(sites: list[Site], place: int) -> ChannelGroup | None:
    """Return the group whose channels a site reads, None where it reads none."""
    consumer, before = sites[place], sites[place - 1]
    if any(site.reads == consumer.reads for site in sites if site != consumer):
        return None
    makers = [site for site in sites[:place] if site.reads == before.reads]
    width, out = consumer.in_features, consumer.out_features
    made = [site.out_features for site in makers]
    if width == out or any(site.in_features != out for site in makers):
        return None
    if any(count % width for count in made) or sum(made) > 2 * width:
        return None
    return ChannelGroup(consumer, tuple(Producer(site, site.out_features // width) for site in makers))
