"""The one loop over the blocks of a model, forward and backward: load, observe, visit, propagate, release.

All that is done to a model block by block is a *visit* here: to solve, to solve and install, to refit, to count
scores. Only one block, or one group of blocks that are changed together, has to be in memory at a time.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal

import torch
from torch import nn

from pared.calibration import (
    BlockInputs,
    BlockStatistics,
    DenseReference,
    Labels,
    Shapes,
    Trail,
    Wants,
    back,
    from_head,
    frozen,
    observe,
    propagate,
    propagate_reference,
    record,
)
from pared.calibration.spool import HiddenStates
from pared.engine.state.pass_record import NoRecord, Record
from pared.engine.turns import Turn, in_turn
from pared.memory import give_back
from pared.structure import Anatomy
from pared.structure.store import BlockStore

Needs = Callable[[Shapes], frozenset[str]]  # names of statistics, from the shapes of sites that read one tensor
Visit = Callable[[BlockStatistics], None]


def run_blocks(
    store: BlockStore,
    anatomy: Anatomy,
    inputs: BlockInputs,
    needs: Needs | None,
    visit: Visit,
    *,
    hand_on: Literal["dense", "compressed"] = "dense",
    changes: bool = False,
    reference: DenseReference | None = None,
    group: int = 1,
    influence: bool = False,
    observed: Callable[[int], nn.Module] | None = None,
    kept: Record | None = None,
    turn: Turn = in_turn,
    on_batch: Callable[[], None] = lambda: None,
) -> None:
    """Let every block run over all batches, one after the other, and visit it with the statistics of its sites.

    With ``hand_on="dense"`` a block reads what the blocks before it output before they were visited: one forward pass.
    With ``"compressed"`` it reads what was made of them: every block runs again after its visit, twice the forward
    passes, the first of which ends as soon as the last site has read, and the hidden states of one more block. Where
    blocks are changed in groups, all of a group run again behind its last one: one pass more, and the hidden states of
    ``group`` blocks. Inside a group a block reads what those before it output so far. The later runs of a block that
    runs several times still read what it outputs before it is changed, as its sites do among themselves.

    Args:
        store: hands out the blocks.
        anatomy: after the probe pass.
        inputs: of the first block; overwritten.
        needs: names of the statistics to collect, from the shapes ``(out, in)`` of the sites that read one tensor;
            with None nothing is observed: only the block of the reference runs before the visit, for which ``inputs``
            hold what the block reads, and the reference what the dense one outputs.
        visit: is given every block's statistics, in order; it may change blocks of the open group.
        hand_on: what later blocks read.
        changes: whether visits change blocks, so that each is committed when its group is complete.
        reference: the dense model, if it runs alongside.
        group: how many neighbouring blocks are changed together, when the last of them is visited.
        influence: measure how much every block changes the hidden states.
        observed: gives a block of the same structure that statistics are of, in place of the one of an index, where
            the compressed one passes on.
        kept: the record of the pass; blocks that it holds only pass on, and are what it restores.
        turn: when a block is visited and let go; beside the run of the next one, where that reads dense outputs.
        on_batch: called after every batch of every block.

    Raises:
        ParedError: an activation is NaN or infinite; names the site.
    """
    read: dict[int, HiddenStates] = {}  # what the blocks of the open group read
    last, compressed, kept = len(store) - 1, hand_on == "compressed", kept or NoRecord()
    with store.without_embeddings():
        for index in range(len(store)):
            if kept.holds(index):
                _hand_on(store, index, anatomy, inputs, kept, hand_on, reference)
                for _ in inputs.calls:
                    on_batch()
                continue
            block = store.load(index)
            store.expect(index + 1)
            if compressed:
                read[index] = inputs.hidden if needs is None else inputs.hidden.clone()
            if needs is None:
                statistics = _unobserved(index, inputs, reference)
            else:
                statistics = observe(
                    observed(index) if observed else block,
                    index,
                    anatomy,
                    inputs,
                    needs,
                    reference=reference,
                    influence=influence,
                    early_exit=compressed,
                    on_batch=on_batch,
                )
            closes = (index + 1) % group == 0 or index == last
            first = index - index % group if closes else index
            gone = range(first, index + 1) if closes else range(0)
            if not compressed:
                turn(partial(_visit, visit, statistics, store, gone, changes, kept))
                del statistics
                continue
            visit(statistics)
            del statistics
            _run_again(store, anatomy, inputs, range(first, index + 1), read, read_again=not closes)
            if closes:
                read.clear()
            _let_go(store, gone, changes, kept)


def run_blocks_backward(
    store: BlockStore,
    anatomy: Anatomy,
    inputs: BlockInputs,
    tokens: torch.Tensor,
    labels: Sequence[Labels],
    wants: Callable[[int], Wants],
    visit: Visit,
    *,
    clip: float = 0.0,
    changes: bool = False,
    group: int = 1,
    batches: int | None = None,
    first_window: int = 0,
    kept: Record | None = None,
    turn: Turn = in_turn,
    on_batch: Callable[[], None] = lambda: None,
) -> None:
    """Send the gradient of the summed loss back through the blocks, from the last to the first, and visit each.

    Blocks run forward one after the other, and what each of them reads is kept; the model's own code around them gives
    the loss, window by window; then every block is recomputed from what it read. Weights are given no gradient. A block
    that runs several times in a pass is gone back through as often; its statistics are over all runs together, and the
    gradient of an example is the sum over them, as that of a shared weight is.

    Memory: what every block reads of ``batches`` batches; with it the embeddings and the logits of a part of a window,
    or the graph of one block and the statistics of one, of all where the batches are taken in more than one part.

    Args:
        store: hands out the blocks.
        anatomy: after the probe pass.
        inputs: of the first block; not changed, so that this can go before a forward pass. Tokens that their attention
            mask leaves out are in no statistic and have no label.
        tokens: the windows ``(windows, length)``.
        labels: where the labels come from, of every draw; each goes back by itself through what is recomputed once.
        wants: makes the accumulators of a block, by site name and statistic name.
        visit: is given every block's statistics, the last block's first; it may change blocks of the open group.
        clip: how many times the median length of its window a token's gradient may have at the head; 0: no limit.
        changes: whether visits change blocks, so that each is committed when its group is complete.
        group: how many neighbouring blocks are changed together, when the first of them is visited.
        batches: how many batches go forward before they come back; all of them if none is given.
        first_window: number of the first window, on which sampled labels depend.
        kept: the record of the pass; blocks that it holds are what it restores, once they were visited.
        turn: when a block is visited and let go; beside the way back through the one before, if visits change nothing.
        on_batch: called after every block of every batch went back.

    Raises:
        ParedError: a gradient is NaN or infinite (names the site), the model has no head that predicts classes, the
            labels do not fit, or examples cannot be told apart where a statistic needs that.
    """
    total, last, kept = len(inputs.calls), len(store) - 1, kept or NoRecord()
    part = total if batches is None else min(batches, total)
    waiting: dict[int, Wants] = {}  # accumulators of blocks that more batches will come back through
    window = first_window
    for start in range(0, max(total, 1), max(part, 1)):  # visited once, too, where other processes have all batches
        trail = Trail(inputs.part(start, start + part))
        _record(store, anatomy, trail)
        there = tokens[window - first_window :][: sum(shape[0] for shape in trail.inputs.hidden.shapes)]
        with frozen(store.model):
            from_head(store.model, anatomy, trail, there, window, labels, clip)
        window += len(there)
        give_back()  # pieces of logits, which the blocks would have no use for
        with store.without_embeddings():
            for index in reversed(range(len(store))):
                block = store.load(index)
                store.expect(index - 1)
                own = waiting.pop(index, None) or wants(index)
                with frozen(store.model):
                    back(block, index, anatomy, trail, own, on_batch)
                give_back()
                if start + part < total:
                    waiting[index] = own
                    store.release(index)
                    continue
                gone = range(index, min(index + group, last + 1)) if index % group == 0 else range(0)
                turn(partial(_visit, visit, BlockStatistics(index, own), store, gone, changes, kept))
                del own


def _record(store: BlockStore, anatomy: Anatomy, trail: Trail) -> None:
    """Let all blocks run forward, and keep what each of them reads."""
    with store.without_embeddings():
        for index in range(len(store)):
            block = store.load(index)
            store.expect(index + 1)
            with frozen(store.model):
                record(block, index, anatomy, trail)
            store.release(index)


def visit_blocks(
    store: BlockStore,
    visit: Visit,
    *,
    changes: bool = False,
    group: int = 1,
    kept: Record | None = None,
    on_block: Callable[[], None] = lambda: None,
) -> None:
    """Visit every block without running anything, in order: what needs no data.

    Args:
        store: hands out the blocks.
        visit: is given every block's index, with no statistics; it may change blocks of the open group.
        changes: whether visits change blocks, so that each is committed when its group is complete.
        group: how many neighbouring blocks are changed together, when the last of them is visited.
        kept: the record of the pass; blocks that it holds are what it restores, and are not visited.
        on_block: called after every block.
    """
    kept = kept or NoRecord()
    with store.without_embeddings():
        for index in range(len(store)):
            if kept.holds(index):
                kept.restore(index)
                on_block()
                continue
            store.load(index)
            visit(BlockStatistics(index, {}))
            on_block()
            if (index + 1) % group == 0 or index == len(store) - 1:
                _let_go(store, range(index - index % group, index + 1), changes, kept)


def _unobserved(index: int, inputs: BlockInputs, reference: DenseReference | None) -> BlockStatistics:
    """Let the dense block alone run over all batches, if there is one."""
    if reference is not None:
        propagate_reference(index, inputs, reference)
    return BlockStatistics(index, {})


def _run_again(
    store: BlockStore,
    anatomy: Anatomy,
    inputs: BlockInputs,
    members: range,
    read: dict[int, HiddenStates],
    read_again: bool,
) -> None:
    """Let blocks run as they are now, on what the first of them read.

    Args:
        store: hands out the blocks.
        anatomy: of the model.
        inputs: become what the last of them outputs.
        members: the blocks, of which the last was visited just now.
        read: what blocks of the open group read.
        read_again: whether what the last of them read is needed once more.
    """
    first, last = members[0], members[-1]
    inputs.hidden.take(read[first].clone() if first < last else read[last])
    if read_again:
        read[last] = inputs.hidden.clone()
    for index in members:
        propagate(store.load(index), index, anatomy, inputs)


def _hand_on(
    store: BlockStore,
    index: int,
    anatomy: Anatomy,
    inputs: BlockInputs,
    kept: Record,
    hand_on: Literal["dense", "compressed"],
    reference: DenseReference | None,
) -> None:
    """Let a block that was visited by an earlier process run as it ran then, and be what it was made then."""
    if reference is not None:
        store.load(index)  # what the reference makes its block of
        propagate_reference(index, inputs, reference)
        store.release(index)
    if hand_on == "compressed":
        kept.restore(index)
    propagate(store.load(index), index, anatomy, inputs)
    store.release(index)
    if hand_on == "dense":
        kept.restore(index)


def _visit(
    visit: Visit, statistics: BlockStatistics, store: BlockStore, gone: range, changes: bool, kept: Record
) -> None:
    """Visit a block, and let go of those of its group, if it is the last of them."""
    visit(statistics)
    _let_go(store, gone, changes, kept)


def _let_go(store: BlockStore, members: range, changes: bool, kept: Record) -> None:
    for member in members:
        if changes and not kept.holds(member):
            store.commit(member)
        else:
            store.release(member)
    for member in members:
        if kept.holds(member):
            kept.restore(member)
        else:
            kept.finish(member)
