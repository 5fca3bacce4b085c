"""Heads of an attention: inputs of its output layer that come from rows of query, key and value layers.

A key/value head goes with the query heads that read it: their rows of the query layer, its rows of the key and the
value layer, and the inputs of the output layer that these query heads make. Neither a name nor a configuration says
which these are: outputs of the layers are replaced, and what reaches the output layer is looked at.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import combinations, product

import torch

from pared.structure.groups import ChannelGroup, Count, Producer, RefusedError
from pared.structure.model import Site
from pared.structure.prover import Prover, every_bit

MOST_COUNTS = 8  # attributes of which every subset is tried


def find_heads(prover: Prover, consumer: Site, candidates: Sequence[Site], sites: set[str]) -> ChannelGroup:
    """Return the key/value heads of an attention with their query heads.

    What is proved:

    - Whatever the layers output for the heads whose number has a bit set (or has it not) changes inputs of each of
      these heads, and no input of another. There is no finer division for which this holds.
    - With the inputs of the output layer held, the block's output is the same bit for bit whatever they output.
    - The block runs with some of the heads alone, and gives what it gives where the output layer ignores the others.
      Where its code counts heads by attributes of the module, the least set of them that makes it so is part of this.

    Args:
        prover: of its block.
        consumer: the output layer.
        candidates: the layers that run right before it on one tensor.
        sites: names of all that may be changed.

    Raises:
        RefusedError: it is no such layer; says why.
    """
    base = {one.name: prover.normal(one) for one in candidates}
    before = prover.input(consumer, base)
    moved = [
        one
        for one in candidates
        if not torch.equal(before, prover.input(consumer, {**base, one.name: prover.normal(one)}))
    ]
    if not moved:
        raise RefusedError("nor are these heads")
    for one in moved:
        if one.name not in sites:
            raise RefusedError(f"heads that {one.name} makes, which is not a target, cannot be taken out")
    producers, heads = _laid_out(prover, consumer, moved)
    prover.require_read_once(consumer, producers)
    group = ChannelGroup(consumer, producers, consumer.in_features // heads, "head")
    return _counted(prover, group)


def _laid_out(prover: Prover, consumer: Site, moved: Sequence[Site]) -> tuple[tuple[Producer, ...], int]:
    """Return the layers in a layout in which inputs of every head follow its own rows alone, and how many heads it has.

    Raises:
        RefusedError: there are no two.
    """
    most = consumer.in_features // _followers(prover, consumer, moved)
    parts = (1, 2, 3) if len(moved) < 3 else (1,)
    for heads in range(most, 1, -1):
        if consumer.in_features % heads or any(one.out_features % heads for one in moved):
            continue
        rows = [one.out_features // heads for one in moved]
        for split in product(parts, repeat=len(moved)):
            if any(count % part for count, part in zip(rows, split, strict=True)):
                continue
            producers = tuple(Producer(*one) for one in zip(moved, rows, split, strict=True))
            if _follows(prover, consumer, producers, heads):
                return producers, heads
    names = " and ".join(one.name for one in moved)
    raise RefusedError(f"nor are they two or more heads, each of its own outputs of {names}")


def _followers(prover: Prover, consumer: Site, moved: Sequence[Site]) -> int:
    """Return how many inputs follow the first output of a layer, of the layer of which most do: a head has as many."""
    base = {one.name: prover.normal(one) for one in moved}
    before, most = prover.input(consumer, base), 1
    for one in moved:
        other = base[one.name].clone()
        other[..., 0] = prover.normal(one)[..., 0]
        changed = prover.input(consumer, {**base, one.name: other}) != before
        most = max(most, int(changed.any(dim=0).sum()))
    return most


def _follows(prover: Prover, consumer: Site, producers: Sequence[Producer], heads: int) -> bool:
    """Whether inputs of a head change where its outputs do, and no input of another head."""
    base = {one.site.name: prover.normal(one.site) for one in producers}
    before = prover.input(consumer, base)
    for pattern in every_bit(heads):
        chosen, outputs = pattern.nonzero()[:, 0], {}
        for one in producers:
            other, rows = base[one.site.name].clone(), one.outputs(chosen)
            other[..., rows] = prover.normal(one.site)[..., rows]
            outputs[one.site.name] = other
        changed = (prover.input(consumer, outputs) != before).any(dim=0).view(heads, -1).any(dim=1).cpu()
        if not torch.equal(changed, pattern):
            return False
    return True


def _counted(prover: Prover, group: ChannelGroup) -> ChannelGroup:
    """Return a group with the fewest attributes that have to go with its heads for its block to run without some.

    Raises:
        RefusedError: it does not, whichever do.
    """
    kept = {tuple(range(1, group.channels)), tuple(range(1, group.channels, 2))}
    refused: RefusedError | None = None
    for counts in _sets_of_counts(prover, group):
        tried = replace(group, counts=counts)
        try:
            for some in sorted(kept):
                prover.require_removable(tried, torch.tensor(some))
        except RefusedError as why:
            refused = refused or why
        else:
            return tried
    assert refused is not None, "a set was tried"
    raise refused


def _sets_of_counts(prover: Prover, group: ChannelGroup) -> Iterator[tuple[Count, ...]]:
    """Yield sets of attributes that may be numbers of heads, or of what they output in all, small sets first."""
    heads = group.channels
    sizes = {group.consumer.in_features, *(one.site.out_features for one in group.producers)}
    found = [
        Count(module, name, value // heads)
        for module, owner in prover.owners(group.sites).items()
        for name, value in vars(owner).items()
        if type(value) is int and value > 0 and value % heads == 0 and any(size % value == 0 for size in sizes)
    ]
    for size in range(min(len(found), MOST_COUNTS) + 1):
        yield from combinations(found[:MOST_COUNTS], size)
