"""Channels of an MLP: inputs of one layer that come, element by element, from outputs of others.

Such an input can be taken out together with the rows that make it, and what is left is a smaller layer of the same
kind. Which layers these are is found by structure and proved on the blocks themselves: what the producers output is
replaced by numbers of our choice, and what reaches the consumer is looked at. Heads of an attention are such channels
too, of several inputs each (:mod:`pared.structure.heads`).
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import nn

from pared.modules.opened import FIRST, SECOND, Expert, OpenedExperts, opened_experts
from pared.structure.calls import BlockCall
from pared.structure.groups import ChannelGroup, Found, Producer, RefusedError
from pared.structure.heads import find_heads
from pared.structure.model import Anatomy, Site
from pared.structure.prover import Outputs, Prover, every_bit
from pared.structure.state import KeptState

STAND_IN_WIDTH, STAND_IN_TOKENS = 4, 16  # of what a stand-in for one expert reads


@torch.no_grad()
def find_channels(
    blocks: Sequence[nn.Module], anatomy: Anatomy, calls: Sequence[BlockCall], heads: bool = False
) -> Found:
    """Find the channel groups of a model, each proved in its own block.

    A consumer's inputs are its own (no other layer reads that tensor), and the layers that make them are those that ran
    right before it on one tensor. What is proved:

    - Input j changes if, and only if, the outputs of channel j do: for every bit of j once those of all channels with
      the bit set are changed, once those of all others.
    - With the consumer's inputs held, the block's output is the same bit for bit whatever the producers output.
    - The block runs with every other channel taken out, and gives what it gives where the consumer ignores them.

    Args:
        blocks: of the model, in evaluation mode; they are as before afterwards.
        anatomy: after the probe pass.
        calls: how blocks were called in it.
        heads: whether key/value heads with their query heads are looked for too.
    """
    groups: list[ChannelGroup] = []
    reasons: dict[str, str] = {}
    first = {call.block: call for call in reversed(calls)}
    for index, block in enumerate(blocks):
        sites = anatomy.sites_of(index)
        if index not in first:
            reasons |= {site.name: "its block was not called" for site in sites}
            continue
        state = KeptState([block])
        own, inside = _of_experts(block, anatomy, index)
        groups += own
        reasons |= inside
        sites = [site for site in sites if site.name not in inside]
        layers = [layer for layer in anatomy.layers if layer.block == index and layer.name not in inside]
        prover = Prover(block, anatomy, first[index], layers)
        for site in sites:
            try:
                groups.append(_group(prover, site, {one.name for one in sites}, heads))
            except RefusedError as why:
                reasons[site.name] = str(why)
        state.restore()
    return Found(tuple(groups), reasons)


def _group(prover: Prover, consumer: Site, sites: set[str], heads: bool) -> ChannelGroup:
    """Return the group of which a site is the consumer.

    Args:
        prover: of its block.
        consumer: the site.
        sites: names of all that may be changed.
        heads: whether it may be one of heads.

    Raises:
        RefusedError: it is none.
    """
    candidates = prover.candidates(consumer)
    try:
        return _of_channels(prover, consumer, candidates, sites)
    except RefusedError as why:
        if not heads:
            raise
        try:
            return find_heads(prover, consumer, candidates, sites)
        except RefusedError as other:
            raise RefusedError(f"{why}; {other}") from None


def _of_channels(prover: Prover, consumer: Site, candidates: Sequence[Site], sites: set[str]) -> ChannelGroup:
    """Return the group of an MLP.

    Raises:
        RefusedError: it is none.
    """
    base = {one.name: prover.numbers(one) for one in candidates}
    before = prover.input(consumer, base)
    moved = [one for one in candidates if not torch.equal(before, prover.input(consumer, _changed(base, one)))]
    if not moved:
        raise RefusedError("what it reads does not depend on the layers that run before it")
    for one in moved:
        if one.name not in sites:
            raise RefusedError(f"what it reads is made by {one.name}, which is not a target")
        if one.out_features % consumer.in_features:
            raise RefusedError(
                f"its {consumer.in_features} inputs are not made one by one by the {one.out_features} outputs of "
                f"{one.name}"
            )
        if (rows := base[one.name].numel() // one.out_features) != len(before):
            raise RefusedError(f"it reads {len(before)} of the {rows} tokens that {one.name} outputs")
    group = ChannelGroup(consumer, _laid_out(prover, consumer, moved))
    prover.require_read_once(consumer, group.producers)
    prover.require_removable(group, torch.arange(0, consumer.in_features, 2))
    return group


def _changed(base: Outputs, site: Site, mask: torch.Tensor | bool = True) -> Outputs:
    """Return outputs of which those of one layer are others, where a mask says so."""
    return {**base, site.name: torch.where(torch.as_tensor(mask), base[site.name] + 0.4, base[site.name])}


def _laid_out(prover: Prover, consumer: Site, moved: Sequence[Site]) -> tuple[Producer, ...]:
    """Return producers in a layout in which every input follows its own channel alone.

    Raises:
        RefusedError: there is none.
    """
    rows = [one.out_features // consumer.in_features for one in moved]
    for apart in (True, False) if max(rows) > 1 else (True,):
        producers = tuple(Producer(one, n, n if apart else 1) for one, n in zip(moved, rows, strict=True))
        if _follows(prover, consumer, producers, signed=False) and _follows(prover, consumer, producers, signed=True):
            return producers
    names = " and ".join(one.name for one in moved)
    raise RefusedError(f"its inputs do not each depend on one channel of {names} alone")


def _follows(prover: Prover, consumer: Site, producers: Sequence[Producer], signed: bool) -> bool:
    """Whether input j changes where the outputs of channel j do (unless they are negative), and nowhere else."""
    width = consumer.in_features
    base = {one.site.name: prover.numbers(one.site, signed) for one in producers}
    before = prover.input(consumer, base)
    patterns, count = torch.stack(list(every_bit(width))), len(before)  # as many at once as there are tokens
    for start in range(0, len(patterns), count):
        expected = torch.zeros(count, width, dtype=torch.bool)
        some = patterns[start : start + count]
        expected[: len(some)] = some
        outputs = base
        for one in producers:
            mask = torch.zeros(count, one.site.out_features, dtype=torch.bool)
            for token, chosen_N in enumerate(expected):
                mask[token, one.outputs(chosen_N.nonzero()[:, 0])] = True
            shape = base[one.site.name].shape
            outputs = _changed(outputs, one.site, mask.view(shape).to(before.device))
        changed = (prover.input(consumer, outputs) != before).cpu()
        if bool((changed & ~expected).any()) or (not signed and bool((expected & ~changed).any())):
            return False
    return True


def _of_experts(block: nn.Module, anatomy: Anatomy, index: int) -> tuple[list[ChannelGroup], dict[str, str]]:
    """Return the channel groups of experts that are layers of their own; of all of their sites, why each reads none.

    What is done between the two layers of an expert is the same for all of a mixture, and no matter of their weights:
    it is proved once, on a stand-in with as many channels. No weight of the block is read.
    """
    groups: list[ChannelGroup] = []
    reasons: dict[str, str] = {}
    sites = {site.name: site for site in anatomy.sites_of(index)}
    for name, opened in opened_experts(block, anatomy.block_name(index)).items():
        known: ChannelGroup | str | None = None
        for number in range(opened.count):
            first, second = (sites.get(f"{name}.{number}.{leaf}") for leaf in (FIRST, SECOND))
            if first is None or second is None:
                reasons |= {one.name: "the other layer of its expert is no target" for one in (first, second) if one}
                continue
            known = _of_expert(opened, first, second) if known is None else known
            reasons |= {first.name: "it makes the channels of its expert", second.name: str(known)}
            if isinstance(known, ChannelGroup):
                producers = tuple(replace(one, site=first) for one in known.producers)
                groups.append(replace(known, consumer=second, producers=producers))
    return groups, reasons


def _of_expert(opened: OpenedExperts, first: Site, second: Site) -> ChannelGroup | str:
    """Return the channel group of a stand-in for one expert, or why there is none."""
    made, read = (replace(one, name=f"experts.0.{leaf}", block=0, reads=f"experts.0.{leaf}")
                  for one, leaf in ((first, FIRST), (second, SECOND)))  # fmt: skip
    anatomy = Anatomy("experts", (made, read), (), (), 0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layers = nn.Linear(STAND_IN_WIDTH, first.out_features), nn.Linear(second.in_features, STAND_IN_WIDTH)
        hidden = torch.randn(1, STAND_IN_TOKENS, STAND_IN_WIDTH)
    expert = Expert(*layers, opened.experts[0].between).eval()
    prover = Prover(expert, anatomy, BlockCall((), {}, hidden, None), (made, read))
    try:
        return _of_channels(prover, read, prover.candidates(read), {made.name, read.name})
    except RefusedError as why:
        return str(why)
