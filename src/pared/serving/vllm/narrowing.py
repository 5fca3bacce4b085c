"""Layers that lost channels: how wide an engine's layers are then, and where the heads that are left stand.

An engine takes the width of an MLP from its weights, so a narrow MLP is one of narrow layers. It takes the number of
heads from the configuration, so an attention that lost heads keeps the width of all of them, with zeros where a head is
gone, and its output layer reads the others only. Weights are no larger for it; the cache of keys and values is.
"""

from collections.abc import MutableMapping, Sequence
from typing import NamedTuple

from pared.serving.vllm.layout import NARROW, Member, Split, Style, UnsupportedError, split

GQA = 3  # segments of a layer that makes queries, keys and values


class Heads(NamedTuple):
    """The heads of an attention on all ranks.

    Attributes:
        queries: how many.
        keys: how many of keys, and as many of values.
        size: channels of one.
    """

    queries: int
    keys: int
    size: int


class Shape(NamedTuple):
    """A layer as an engine has made it from the model's configuration.

    Attributes:
        style: how it is cut over ranks.
        inputs: columns on all ranks.
        sizes: rows on all ranks, by segment.
        ranks: how many there are.
        rank: which of them.
        heads: of a layer that makes queries, keys and values.
    """

    style: Style
    inputs: int
    sizes: tuple[int, ...]
    ranks: int = 1
    rank: int = 0
    heads: Heads | None = None

    @property
    def replicas(self) -> tuple[int, ...]:
        """On how many ranks each row is, by segment."""
        if self.heads is None or self.ranks <= self.heads.keys:
            return (1,) * len(self.sizes)
        copies = self.ranks // self.heads.keys
        return (1, copies, copies)


class Arrangement(NamedTuple):
    """What a rank holds of a layer, and where the channels that are left stand.

    Attributes:
        cut: of the weight, as wide as it is.
        outputs: of a segment that lost heads, where its rows stand in the dense one.
        inputs: where the columns stand in the dense layer, if heads were lost before it.
    """

    cut: Split
    outputs: dict[int, list[int]]
    inputs: list[int] | None = None


# By the name of the module around them: the width of an MLP that lost channels, or where the channels of queries stand.
Narrowed = MutableMapping[str, int | list[int]]


def arrange(prefix: str, members: Sequence[Member], shape: Shape, narrowed: Narrowed) -> Arrangement:
    """Return what a rank holds of a layer some of whose modules may have lost channels.

    Args:
        prefix: the full name of the layer.
        members: what it is made of.
        shape: as the engine has made it.
        narrowed: by the layers before this one; this adds itself, and a layer that reads it takes it out.

    Raises:
        UnsupportedError: the layer would not compute what the checkpoint says; names the module.
    """
    parent = prefix.rpartition(".")[0]
    sizes = _kept_sizes(members, shape)
    narrow = [one for one in members if one.kind in NARROW]
    reads = next((one for one in narrow if one.entry["in_features"] != shape.inputs), None)
    made = next((one for one in narrow if one.entry["out_features"] != _rows(one, shape)), None)
    if shape.style == "row":
        if made is not None:
            raise UnsupportedError(f"{made.name}: outputs were removed of a layer that adds to the hidden state")
        return _reading(members[0], reads is not None, shape, narrowed.pop(parent, None))
    if reads is not None:
        raise UnsupportedError(f"{reads.name}: inputs were removed of a layer that reads the hidden state")
    if made is None:
        return Arrangement(_cut(members[0], shape, shape.inputs, shape.sizes), {})
    if parent in narrowed:
        raise UnsupportedError(f"{made.name}: a second layer of {parent} lost outputs, and one layer reads them")
    if shape.heads is not None:
        narrowed[parent], outputs = _lost_heads(made.name, shape.heads, sizes)
        return Arrangement(_cut(made, shape, shape.inputs, shape.sizes), outputs)
    if len(set(sizes)) > 1:
        raise UnsupportedError(f"{made.name}: parts of {prefix} are {sizes} wide; expected one width")
    narrowed[parent] = sizes[0]
    return Arrangement(_cut(made, shape, shape.inputs, sizes), {})


def _cut(member: Member, shape: Shape, inputs: int, sizes: tuple[int, ...]) -> Split:
    try:
        return split(shape.style, inputs, sizes, shape.ranks, shape.rank, shape.replicas)
    except UnsupportedError as error:
        raise UnsupportedError(f"{member.name}: {error}") from None


def _rows(member: Member, shape: Shape) -> int:
    return sum(shape.sizes[one] for one in member.segments)


def _kept_sizes(members: Sequence[Member], shape: Shape) -> tuple[int, ...]:
    """Return the rows of each segment that are left."""
    sizes = list(shape.sizes)
    for member in members:
        if member.kind not in NARROW or member.entry["out_features"] == _rows(member, shape):
            continue
        parts = member.entry["parts"]
        if parts != len(member.segments):
            raise UnsupportedError(
                f"{member.name}: {parts} parts lost channels, but it makes {len(member.segments)} outputs"
            )
        for one in member.segments:
            sizes[one] = member.entry["out_features"] // parts
    return tuple(sizes)


def _reading(member: Member, narrow: bool, shape: Shape, before: int | list[int] | None) -> Arrangement:
    """Return the arrangement of a row-parallel layer, behind layers that lost outputs or not."""
    if not narrow:
        if before is not None:
            raise UnsupportedError(f"{member.name}: the layer before it lost channels, and it reads all of them")
        return Arrangement(_cut(member, shape, shape.inputs, shape.sizes), {})
    width = member.entry["in_features"]
    if before is None or width != (before if isinstance(before, int) else len(before)):
        raise UnsupportedError(
            f"{member.name}: {width} of {shape.inputs} inputs are left, and no layer is known to have lost the others"
        )
    if isinstance(before, int):
        return Arrangement(_cut(member, shape, width, shape.sizes), {})
    return Arrangement(_cut(member, shape, shape.inputs, shape.sizes), {}, before)


def _lost_heads(name: str, dense: Heads, sizes: tuple[int, ...]) -> tuple[list[int], dict[int, list[int]]]:
    """Return where queries stand, and where the rows of every segment do."""
    if len(sizes) != GQA or sizes[1] != sizes[2] or sizes[0] % dense.size or sizes[1] % dense.size:
        raise UnsupportedError(f"{name}: {sizes} channels of queries, keys and values are not heads of {dense.size}")
    kept = Heads(sizes[0] // dense.size, sizes[1] // dense.size, dense.size)
    try:
        queries, keys = head_places(dense, kept)
    except ValueError as error:
        raise UnsupportedError(f"{name}: {error}") from None
    return queries, {0: queries, 1: keys, 2: keys}


def head_places(dense: Heads, kept: Heads) -> tuple[list[int], list[int]]:
    """Return where the channels of an attention that lost heads stand in one that has all of its heads.

    A group of queries reads one key. The groups that are left are spread over those of the dense one, so that every
    rank gets its share, and so are queries within a group: every query reads the key that it read before.

    Args:
        dense: as the architecture says.
        kept: what is left.

    Returns:
        The channels of queries, and those of keys and values, rising.

    Raises:
        ValueError: queries are not divided evenly among keys, or there are more of one than before.
    """
    if kept.keys < 1 or dense.queries % dense.keys or kept.queries % kept.keys:
        raise ValueError(f"{kept.queries} heads of queries on {kept.keys} of keys, in place of {dense.queries} on "
                         f"{dense.keys}: expected as many queries for every key")  # fmt: skip
    whole, left = dense.queries // dense.keys, kept.queries // kept.keys
    if kept.keys > dense.keys or left > whole:
        raise ValueError(f"{kept.queries} heads of queries on {kept.keys} of keys are more than the architecture's "
                         f"{dense.queries} on {dense.keys}")  # fmt: skip
    groups = [place * dense.keys // kept.keys for place in range(kept.keys)]
    heads = [group * whole + place * whole // left for group in groups for place in range(left)]
    return _channels(heads, dense.size), _channels(groups, dense.size)


def _channels(heads: list[int], size: int) -> list[int]:
    return [head * size + channel for head in heads for channel in range(size)]
