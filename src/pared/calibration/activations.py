"""What the first block reads and what every block is called with, without running a single block."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from pared.calibration.spool import ActivationMemory, HiddenStates
from pared.errors import ParedError
from pared.structure.calls import adapted
from pared.structure.model import Anatomy
from pared.structure.probe import BlockCall, StopForwardError, replaced_forwards, run_model


@dataclass
class BlockInputs:
    """The inputs of the first block and the calls of all blocks, one entry a batch.

    A block that runs several times in a pass has as many calls, one after the other.

    Attributes:
        hidden: hidden states ``(batch, tokens, width)`` of every batch; the walk overwrites them block by block.
        calls: for every batch, how the blocks are called, in order; equal tensors are held once.
        dtype: what the blocks compute in.
        device: where they do.
        beside: for every batch, what the model was given besides the tokens, ``(batch, tokens)`` by argument; nothing
            for windows without padding.
    """

    hidden: HiddenStates
    calls: list[list[BlockCall]]
    dtype: torch.dtype
    device: torch.device
    beside: list[Mapping[str, torch.Tensor]] = field(default_factory=list)

    def calls_of(self, batch: int, block: int) -> list[BlockCall]:
        """Return the calls of one block in a batch, in order."""
        return [call for call in self.calls[batch] if call.block == block]

    def part(self, start: int, stop: int) -> "BlockInputs":
        """Return the same inputs, not copied, of some batches alone; what is done to them leaves these as they are."""
        there = slice(start, stop)
        return replace(self, hidden=self.hidden.part(start, stop), calls=self.calls[there], beside=self.beside[there])

    def mask(self, batch: int) -> torch.Tensor | None:
        """Return which tokens ``(batch, tokens)`` of a batch are no padding, bool; none if all are."""
        mask = self.beside[batch].get("attention_mask")
        return None if mask is None or bool(mask.all()) else mask.bool().to(self.device)


def capture(
    model: PreTrainedModel,
    anatomy: Anatomy,
    tokens: torch.Tensor,
    batch: int,
    probed: list[BlockCall],
    dtype: torch.dtype,
    device: torch.device,
    beside: Mapping[str, torch.Tensor] | None = None,
    memory: ActivationMemory | None = None,
) -> BlockInputs:
    """Run everything before and between the blocks on ``tokens (windows, length)``, but no block.

    Every block is replaced by a stub that writes down how it was called and hands its input on. Masks, position
    embeddings and whatever else a block is given are therefore those of the real call, on any architecture.

    Args:
        model: the model; unchanged afterwards.
        anatomy: of the model.
        tokens: the calibration windows.
        batch: windows in one forward pass.
        probed: the calls of the probe pass, in which the blocks really ran.
        dtype: what the blocks will compute in.
        device: where they will.
        beside: what the model is given besides the tokens, as ``call_model``; ``Windows.beside``.
        memory: what hidden states share with all others of the run; without a limit if not given.

    Raises:
        ParedError: a block's arguments depend on what an earlier block computed, which a walk cannot reproduce.
    """
    with _stubbed(model, anatomy, probed) as recorded:
        probe_tokens = torch.arange(probed[0].hidden.shape[1]).remainder(model.get_input_embeddings().weight.shape[0])
        try:
            run_model(model, probe_tokens.unsqueeze(0))
        except Exception as error:  # these tokens went through the probe pass: only a block's own result was missing
            if isinstance(error, ParedError) and error.__cause__ is None:
                raise
            raise _cross_block_dependency_error(anatomy, probed[min(len(recorded), len(probed) - 1)]) from error
        if len(recorded) < len(probed):
            raise _other_order(anatomy)
        _require_same_arguments(anatomy, probed, recorded)
        inputs = BlockInputs(HiddenStates(memory=memory), [], dtype, device)
        for start in range(0, len(tokens), batch):
            recorded.clear()
            more = {name: tensor[start : start + batch] for name, tensor in (beside or {}).items()}
            run_model(model, tokens[start : start + batch], more)
            if len(recorded) < len(probed):
                raise _other_order(anatomy)
            inputs.beside.append(more)
            inputs.hidden.append(recorded[0].hidden.to(device, dtype))
            first = inputs.calls[0] if inputs.calls else None
            known: dict[int, torch.Tensor] = {}  # blocks are given the same masks and tables: one copy of each
            calls = [adapted(call, dtype, device, known) for call in recorded]
            inputs.calls.append([_share(call, first[index]) for index, call in enumerate(calls)] if first else calls)
    return inputs


def drop_padding(x: torch.Tensor, mask_BT: torch.Tensor | None, site: str) -> torch.Tensor:
    """Return the rows of what a site reads or outputs that belong to no padding, ``(1, rows, features)``.

    Args:
        x: ``(..., features)``, one row a token of the batch.
        mask_BT: which tokens are no padding; ``x`` is returned as it is if none is given.
        site: for the error.

    Raises:
        ParedError: the rows are not one a token, so that those of padding cannot be told.
    """
    if mask_BT is None:
        return x
    x_RN = x.reshape(-1, x.shape[-1])
    if len(x_RN) != mask_BT.numel():
        raise ParedError(
            f"site {site} has {len(x_RN)} rows of {mask_BT.shape[0]} padded windows of {mask_BT.shape[1]} tokens, so "
            "its padding cannot be told apart; use data without padding"
        )
    return x_RN[mask_BT.flatten()].unsqueeze(0)


@contextmanager
def _stubbed(model: PreTrainedModel, anatomy: Anatomy, probed: list[BlockCall]) -> Iterator[list[BlockCall]]:
    recorded: list[BlockCall] = []
    blocks = anatomy.blocks(model)

    def stub(index: int) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            place = len(recorded)
            if index != probed[place].block:
                raise _other_order(anatomy)
            call = BlockCall.seen(args, kwargs, anatomy.block_name(index), index)
            recorded.append(replace(call, returns=probed[place].returns))
            if len(recorded) == len(probed):
                raise StopForwardError
            call = recorded[-1]
            return call.answer(call.hidden)

        return forward

    with replaced_forwards(blocks, stub):
        yield recorded


@contextmanager
def replaced_output(
    blocks: list[nn.Module],
    calls: Sequence[BlockCall],
    output: Callable[[torch.Tensor], torch.Tensor],
    name: Callable[[int], str] = str,
) -> Iterator[None]:
    """Let a model run without its blocks: each hands on what it is given, and the last one that runs makes an output.

    Args:
        blocks: of the model.
        calls: of them in one pass, in order; the model may be called any number of times.
        output: from what the last block is given to what it is to output.
        name: of a block by its index, for the error.
    """
    ran = 0

    def stub(index: int) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            nonlocal ran
            ran += 1
            call = calls[(ran - 1) % len(calls)]
            own = BlockCall.seen(args, kwargs, name(index), index).hidden
            return call.answer(output(own) if ran % len(calls) == 0 else own)

        return forward

    with replaced_forwards(blocks, stub):
        yield


def _require_same_arguments(anatomy: Anatomy, probed: list[BlockCall], stubbed: list[BlockCall]) -> None:
    for real, stub in zip(probed, stubbed, strict=True):
        real_tensors, stub_tensors = real.tensors(), stub.tensors()
        same = len(real_tensors) == len(stub_tensors) and all(
            a.shape == b.shape and torch.equal(a, b) for a, b in zip(real_tensors, stub_tensors, strict=True)
        )
        if not same:
            raise _cross_block_dependency_error(anatomy, real)


def _other_order(anatomy: Anatomy) -> ParedError:
    return ParedError(
        f"how often the blocks of {anatomy.blocks_path} run depends on what they compute, or on the text; only "
        "data-free methods (svd, magnitude, with uniform allocation) can be used"
    )


def _cross_block_dependency_error(anatomy: Anatomy, call: BlockCall) -> ParedError:
    return ParedError(
        f"block {anatomy.block_name(call.block)} is given values that an earlier block computed "
        f"(arguments {sorted(call.kwargs)}); such models cannot be walked block by block yet"
    )


def _share(call: BlockCall, first: BlockCall) -> BlockCall:
    """Return the first batch's call if the arguments are equal, so that equal tensors are held once."""
    ours, theirs = call.tensors(), first.tensors()
    equal = len(ours) == len(theirs) and all(
        a.shape == b.shape and torch.equal(a, b) for a, b in zip(ours, theirs, strict=True)
    )
    return first if equal else call
