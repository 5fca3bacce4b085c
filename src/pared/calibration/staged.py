"""A whole model on many inputs, each of its blocks in memory once: all inputs go through a block before the next one.

What a call of the model gives for one input is given here too, to the last bit: the model's own code runs what stands
before, between and behind the blocks, and every block is called with the arguments it is called with there.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Any, Protocol

import torch
from torch import nn
from transformers import PreTrainedModel

from pared.calibration.activations import replaced_output
from pared.calibration.spool import ActivationMemory, HiddenStates
from pared.errors import ParedError
from pared.memory import lacks_memory
from pared.structure.calls import BlockCall
from pared.structure.probe import replaced_forwards
from pared.structure.state import KeptState, tensors_in

log = logging.getLogger(__name__)

Input = Mapping[str, Any]


class Blocks(Protocol):
    """The blocks of a model, in memory only between ``load`` and ``release``."""

    model: PreTrainedModel

    @property
    def blocks(self) -> list[nn.Module]:
        """The modules, in order, in memory or not."""

    def load(self, index: int) -> nn.Module:
        """Return a block in memory."""

    def expect(self, index: int) -> None:
        """Be told which is loaded next."""

    def release(self, index: int) -> None:
        """Release it."""

    def running(self) -> AbstractContextManager[None]:
        """Let the whole model be called."""


class _OtherwiseError(Exception):
    """The model cannot be run in stages: its blocks are no chain, or keep something from call to call."""


# What Python and torch raise where a block is given something else than the model gives it.
LACKING = (TypeError, AttributeError, LookupError, ValueError, AssertionError, RuntimeError)


def _otherwise(error: Exception) -> Exception:
    """Return what a failure in stages means; what is of the machine and not of the model is itself."""
    if lacks_memory(error):
        return error
    return _OtherwiseError()


class _Stop(Exception):  # noqa: N818 - no error
    """Every block was called."""


@torch.no_grad()
def run_staged(store: Blocks, inputs: Sequence[Input], memory: ActivationMemory | None = None) -> Iterator[Any]:
    """Yield what a model outputs for every input, in order.

    The first input goes through the whole model as it is too, one block after the other. If that gives another result
    than in stages, be it by a bit, all others go that way, and every block is read for each of them.

    Memory: one block, the hidden states of all inputs as ``memory`` allows, and one output.

    Args:
        store: of the model, which is in evaluation mode.
        inputs: what the model is given, by the names of its arguments; at least one.
        memory: what hidden states share.
    """
    model = store.model
    with store.running():
        watched = _Watched()
        with watched.on(store.blocks):
            first = model(**inputs[0])
    try:
        yield from _in_stages(store, inputs, watched, first, memory or ActivationMemory())
    except _OtherwiseError as error:
        log.warning("the blocks are no chain (%s): each is read again for every input", error.__cause__ or "by result")
        yield first
        with store.running():
            for given in inputs[1:]:
                yield model(**given)


@dataclass
class _Watched:
    """The calls of blocks in one pass of the whole model: which, and the form of what each gave back."""

    order: list[int] = field(default_factory=list)
    returns: list[int] = field(default_factory=list)

    @contextmanager
    def on(self, blocks: list[nn.Module]) -> Iterator[None]:
        """Watch for the length of a ``with`` block."""

        def hook(index: int) -> Callable[..., None]:
            def look(_: nn.Module, __: Any, output: Any) -> None:
                self.order.append(index)
                self.returns.append(len(output) if isinstance(output, (tuple, list)) else 0)

            return look

        handles = [block.register_forward_hook(hook(index)) for index, block in enumerate(blocks)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def _in_stages(
    store: Blocks, inputs: Sequence[Input], watched: _Watched, first: Any, memory: ActivationMemory
) -> Iterator[Any]:
    if not watched.order:
        raise _OtherwiseError
    hidden, calls = HiddenStates(memory=memory), list[list[BlockCall]]()
    for given in inputs:
        recorded = _recorded(store, given, watched)
        hidden.append(recorded[0].hidden)
        calls.append(
            [_shared(call, before) for call, before in zip(recorded, calls[0] if calls else recorded, strict=True)]
        )
    _through_blocks(store, hidden, calls, watched)
    for number, given in enumerate(inputs):
        output = _head(store, given, calls[number], hidden[number])
        if number == 0 and not _equal(output, first):
            raise _OtherwiseError
        yield output


def _through_blocks(store: Blocks, hidden: HiddenStates, calls: list[list[BlockCall]], watched: _Watched) -> None:
    """Send every input through all blocks, one stage after the other; overwrites the hidden states."""
    for index, places in groupby(range(len(watched.order)), key=watched.order.__getitem__):
        runs, block = list(places), store.load(index)
        store.expect(index + 1)
        try:
            state = KeptState([block])
            for number in range(len(hidden)):
                for place in runs:
                    hidden[number] = calls[number][place].run(block, hidden[number])
            if state.changes():
                raise _OtherwiseError
        except ParedError:
            raise
        except LACKING as error:  # the first input went through the whole model: it is what stages lack
            raise _otherwise(error) from error
        finally:
            store.release(index)


def _recorded(store: Blocks, given: Input, watched: _Watched) -> list[BlockCall]:
    """Return how the blocks are called for an input, none of which runs; the first call holds what it reads."""
    recorded: list[BlockCall] = []

    def stub(index: int) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            place = len(recorded)
            if index != watched.order[place]:
                raise _OtherwiseError
            call = replace(BlockCall.seen(args, kwargs, str(index), index), returns=watched.returns[place])
            recorded.append(call if place == 0 else replace(call, hidden=call.hidden.new_empty(0)))
            if len(recorded) == len(watched.order):
                raise _Stop
            return call.answer(call.hidden)

        return forward

    try:
        with replaced_forwards(store.blocks, stub):
            store.model(**given)
    except _Stop:
        return recorded
    except (ParedError, *LACKING) as error:  # the model ran on its own: what is missing is a block's own result
        raise _otherwise(error) from error
    raise _OtherwiseError


def _head(store: Blocks, given: Input, calls: list[BlockCall], hidden: torch.Tensor) -> Any:
    """Return what the model makes of the last block's output."""
    with replaced_output(store.blocks, calls, lambda _: hidden):
        return store.model(**given)


def _shared(call: BlockCall, before: BlockCall) -> BlockCall:
    """Return a call with the arguments of another if they are equal, so that masks and tables are held once."""
    ours, theirs = call.tensors(), before.tensors()
    equal = len(ours) == len(theirs) and all(
        a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b) for a, b in zip(ours, theirs, strict=True)
    )
    return replace(before, hidden=call.hidden.new_empty(0)) if equal else replace(call, hidden=call.hidden.new_empty(0))


def _equal(one: Any, other: Any) -> bool:
    ours, theirs = list(tensors_in(one)), list(tensors_in(other))
    return len(ours) == len(theirs) and all(
        a.shape == b.shape and torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(ours, theirs, strict=True)
    )
