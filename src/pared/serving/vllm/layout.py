"""Which modules of a checkpoint make one layer of an inference engine, and which part of them one rank holds.

An engine fuses layers that read the same input (query, key and value; gate and up) and cuts every layer over the ranks
of tensor parallelism. Here are names and whole numbers only, no tensor.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

Style = Literal["replicated", "column", "row"]
Entry = Mapping[str, Any]

DENSE = "dense"  # a module that is not in the map
FACTORS = ("low_rank", "pivoted")
NARROW = ("narrow", "narrow_conv1d")
DOWN = ".down.weight"
INSTEAD = "pared export --to dense makes a folder that can be served"


class UnsupportedError(ValueError):
    """A layer that would not compute what the checkpoint says; names the module."""


@dataclass(frozen=True)
class Member:
    """One module of the checkpoint inside of a layer of the engine.

    Attributes:
        name: of the module, as the engine calls it where it does not fuse it.
        kind: of its entry in the map, or ``dense``.
        entry: the map's; empty for a dense one.
        segments: which of the layer's outputs it makes: one of query, key and value, or all of them.
        basis: for factors, the name of the stored tensor that ``down.weight`` is.
    """

    name: str
    kind: str
    entry: Entry
    segments: tuple[int, ...]
    basis: str = ""


def require_no_experts(experts: Mapping[str, Entry]) -> None:
    """Refuse a checkpoint whose experts are compressed one by one.

    Args:
        experts: the layouts of the map, by the name of the module that holds experts.

    Raises:
        UnsupportedError: there are any; names the first.
    """
    if experts:
        raise UnsupportedError(f"{min(experts)}: its experts are compressed one by one, and the engine multiplies by "
                               f"those of a mixture together; {INSTEAD}")  # fmt: skip


def members_of(
    prefix: str,
    segments: int,
    fused: Mapping[str, Sequence[str]],
    modules: Mapping[str, Entry],
    shared: Mapping[str, str],
) -> list[Member]:
    """Return the modules that make a layer, in the order of its outputs; none if the map changes none of them.

    Args:
        prefix: the full name of the layer.
        segments: of how many parts its outputs consist.
        fused: the last names of the modules that a fused layer is made of, by its own last name.
        modules: the entries of the map by name.
        shared: the shared tensors of the map, by name the one that each is.

    Raises:
        UnsupportedError: the layer is fused of another number of modules than its outputs have parts.
    """
    parent, _, leaf = prefix.rpartition(".")
    leaves = list(fused.get(leaf, [leaf]))
    names = [f"{parent}.{one}" if parent else one for one in leaves]
    changed = [name for name in names if name in modules]
    if not changed:
        return []
    if len(names) > 1 and len(names) != segments:
        raise UnsupportedError(
            f"{changed[0]}: {prefix} is fused of {len(names)} modules ({', '.join(leaves)}) and has {segments} "
            "outputs; expected as many"
        )
    places = [(place,) for place in range(segments)] if len(names) > 1 else [tuple(range(segments))]
    return [_member(name, place, modules, shared) for name, place in zip(names, places, strict=True)]


def _member(name: str, segments: tuple[int, ...], modules: Mapping[str, Entry], shared: Mapping[str, str]) -> Member:
    entry = modules.get(name, {})
    kind = entry.get("kind", DENSE)
    if entry.get("bits"):
        raise UnsupportedError(f"{name}: stored in {entry['bits']} bits, which this plugin does not serve; {INSTEAD}")
    basis = shared.get(name + DOWN, name + DOWN) if kind in FACTORS else ""
    return Member(name, kind, entry, segments, basis)


class Split(NamedTuple):
    """What one rank holds of a layer's dense weight.

    Attributes:
        inputs: its columns.
        columns: how many there are on all ranks.
        outputs: its rows, by segment, counted from the segment's first.
        sizes: how many there are on all ranks, by segment.
    """

    inputs: range
    columns: int
    outputs: tuple[range, ...]
    sizes: tuple[int, ...]


def split(
    style: Style, inputs: int, sizes: Sequence[int], ranks: int, rank: int, replicas: Sequence[int] = ()
) -> Split:
    """Return which part of a layer's weight a rank holds.

    Column-parallel layers are cut by rows, segment by segment, row-parallel ones by columns.

    Args:
        style: how the engine cuts the layer.
        inputs: columns of the whole weight.
        sizes: rows of each segment of the whole weight.
        ranks: how many there are.
        rank: which of them.
        replicas: on how many ranks each row of a segment is; 1 for all if nothing is said, more of heads that are
            fewer than the ranks.

    Raises:
        UnsupportedError: a side is not divisible by the ranks that share it.
    """
    every = tuple(range(size) for size in sizes)
    if style == "replicated" or ranks == 1:
        return Split(range(inputs), inputs, every, tuple(sizes))
    if style == "row":
        return Split(_part(inputs, ranks, rank), inputs, every, tuple(sizes))
    copies = replicas or [1] * len(sizes)
    cut = tuple(_part(size, ranks // copy, rank // copy) for size, copy in zip(sizes, copies, strict=True))
    return Split(range(inputs), inputs, cut, tuple(sizes))


def _part(size: int, parts: int, part: int) -> range:
    if size % parts:
        raise UnsupportedError(f"{size} channels cannot be divided among {parts} ranks; take another number of ranks")
    return range(part * (size // parts), (part + 1) * (size // parts))
