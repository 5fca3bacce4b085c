"""One pass of a few tokens through the real model: which sites read what, what is linear, whether blocks chain."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from pared.errors import ParedError
from pared.structure.calls import BlockCall, hidden_of
from pared.structure.model import Anatomy
from pared.structure.state import KeptState, tensors_in
from pared.structure.watch import Watch

__all__ = [
    "BlockCall",
    "StopForwardError",
    "call_model",
    "evaluating",
    "hidden_of",
    "hooks",
    "probe",
    "probe_shapes",
    "run_model",
    "runs_of_shapes",
]

_DATA_FREE = "only data-free methods (svd, magnitude, with uniform allocation) can be used"
PROBE_TOKENS = 8


class StopForwardError(Exception):
    """Ends a forward pass once what was wanted has been seen; the head is never run."""


@torch.no_grad()
def run_model(model: PreTrainedModel, tokens: torch.Tensor, beside: Mapping[str, torch.Tensor] | None = None) -> None:
    """Run the model on ``tokens (batch, length)`` without a cache until a hook stops it."""
    with suppress(StopForwardError):
        call_model(model, tokens, beside)


def without_cache(model: PreTrainedModel) -> dict[str, bool]:
    """Return the argument that lets a model run without a cache: one of layers without attention cannot be filled."""
    return {"use_cache": False} if hasattr(model.config, "use_cache") else {}


def call_model(model: PreTrainedModel, tokens: torch.Tensor, beside: Mapping[str, torch.Tensor] | None = None) -> Any:
    """Return what the model outputs for ``tokens (batch, length)``, without a cache.

    Args:
        model: the model.
        tokens: what it reads.
        beside: what else it is given, by the argument's name: ``attention_mask`` and ``token_type_ids``, each
            ``(batch, length)``.

    Raises:
        ParedError: it needs more than these, or does not take them.
    """
    device = model.get_input_embeddings().weight.device
    more: dict[str, Any] = {name: tensor.to(device) for name, tensor in (beside or {}).items()}
    more |= without_cache(model)
    try:
        return model(input_ids=tokens.to(device), **more)
    except (StopForwardError, ParedError):
        raise
    except Exception as error:  # its code may raise anything, an AssertionError or KeyError of a head too
        given = f"token ids with {' and '.join(beside)}" if beside else "token ids alone"
        raise ParedError(
            f"{type(model).__name__} cannot be run on {given} ({type(error).__name__}: "
            f"{' '.join(str(error).split())[:160]}); this architecture is not supported"
        ) from error


@contextmanager
def hooks(handles: Iterable[Any]) -> Iterator[None]:
    """Keep hooks for the length of a ``with`` block, whatever happens inside."""
    with ExitStack() as stack:
        for handle in handles:
            stack.callback(handle.remove)
        yield


@contextmanager
def replaced_forwards(modules: Sequence[nn.Module], stub: Callable[[int], Callable[..., Any]]) -> Iterator[None]:
    """Let every module run ``stub(its index)`` for the length of a ``with`` block."""
    own = [vars(module).get("forward") for module in modules]  # accelerate's hooks put one there
    try:
        for index, module in enumerate(modules):
            module.forward = stub(index)
        yield
    finally:
        for module, forward in zip(modules, own, strict=True):
            del module.forward
            if forward is not None:
                module.forward = forward


def probe(model: PreTrainedModel, anatomy: Anatomy, read: bool = True) -> tuple[Anatomy, list[BlockCall]]:
    """Run a few tokens through the model; record which sites read the same tensor and prove that they are linear.

    The pass runs to the model's end, as a block may run again after the last one has run. Where something of what
    the blocks read is needed, every call is then repeated outside of the model and must give what it gave inside.

    Args:
        model: the whole model; its mode and whatever its blocks keep between calls are afterwards as before.
        anatomy: of it.
        read: whether anything of what the blocks read is needed; if not, they may be blocks that no token reaches, or
            wired in any way.

    Returns:
        The anatomy with ``reads``, ``seen``, ``idle`` and the order of sites filled in, without what is not
        ``x Wᵀ + b``; and how the blocks were called, in order. No calls, and ``reads`` assumed, where no pass can tell.

    Raises:
        ParedError: with ``read``: the blocks are not a chain, each run one or more times in a row on the output of the
            run before, or never run, or a call cannot be repeated. Always: no site is left.
    """
    blocks = anatomy.blocks(model)
    states, watch = [KeptState([block]) for block in blocks], Watch(anatomy, keep=read)
    vocabulary = model.get_input_embeddings().weight.shape[0]
    tokens = torch.arange(PROBE_TOKENS).remainder(vocabulary).unsqueeze(0)
    failed: ParedError | None = None
    with evaluating(model), torch.inference_mode(False):  # versions of tensors reveal changes in place
        try:
            with hooks(watch.hooked(model, blocks)):
                run_model(model, tokens)
        except ParedError as error:  # behind the last block, as where a decoder is given no tokens, it does not matter
            failed = None if watch.is_complete(len(blocks)) else error
        try:
            if read:
                watch.require_chain(len(blocks), failed)
                _require_repeatable(anatomy, blocks, watch, states)
        finally:
            for state in states:
                state.restore()
    if not watch.order or failed is not None:
        return watch.without_faults(anatomy.with_assumed_reads()), []
    return watch.result(), watch.calls


def probe_shapes(model: PreTrainedModel, anatomy: Anatomy) -> Anatomy:
    """Return what :func:`probe` finds of a model on the meta device; ``reads`` assumed where it does not run there."""
    blocks = anatomy.blocks(model)
    for run in runs_of_shapes(model):
        watch = Watch(anatomy, keep=False)
        with hooks(watch.hooked(model, blocks)):
            run()
        if watch.is_complete(len(blocks)):
            return watch.result()
    return anatomy.with_assumed_reads()


def runs_of_shapes(model: PreTrainedModel) -> Iterator[Callable[[], None]]:
    """Yield ways to run a model on the meta device, one of which may get to its end; none raises."""
    tokens = torch.zeros(1, PROBE_TOKENS, dtype=torch.long, device="meta")
    whole = torch.zeros(1, 1, PROBE_TOKENS, PROBE_TOKENS, device="meta", dtype=model.dtype)

    def run(beside: Mapping[str, torch.Tensor]) -> None:
        with suppress(ParedError, NotImplementedError), evaluating(model):
            run_model(model, tokens, beside)

    # Masks are made by code that looks at values, of which there are none: a finished mask is taken as it is.
    tries: tuple[dict[str, torch.Tensor], ...] = ({}, {"attention_mask": whole})
    for beside in tries:
        yield partial(run, beside)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Have every module in evaluation mode for the length of a ``with`` block: no dropout, no routing noise.

    Every module has its own mode again afterwards; one that came meanwhile, that of what it replaced or lies in.
    """
    modes = {name: module.training for name, module in model.named_modules()}
    try:
        model.eval()
        yield
    finally:
        for name, module in model.named_modules():
            while name not in modes:
                name = name.rpartition(".")[0]
            module.training = modes[name]


@torch.no_grad()
def _require_repeatable(anatomy: Anatomy, blocks: list[nn.Module], watch: Watch, states: list[KeptState]) -> None:
    """Run every call again, from the state of before the pass, and compare; a walk does nothing else.

    Raises:
        ParedError: a block gives something else than inside the model, or cannot be called outside of it; or what it
            gives depends on an earlier run whose traces were on it before this one.
    """
    # A state of zeros is that of an unused model.
    before = tensors_in([former for state in states for former in state.changes()])
    stale = any(bool(tensor.count_nonzero()) for tensor in before)
    for restored in (False, True) if stale else (True,):
        for call, hidden, output in zip(watch.calls, watch.hidden, watch.outputs, strict=True):
            if restored:
                states[call.block].restore()
            name = anatomy.block_name(call.block)
            try:
                again = call.run(blocks[call.block], hidden.clone())
            except Exception as error:  # whatever it is: it ran inside the model
                raise ParedError(
                    f"block {name} cannot be run by itself on what it was called with in the model "
                    f"({type(error).__name__}: {' '.join(str(error).split())[:120]}); {_DATA_FREE}"
                ) from error
            difference = _difference(again, output)
            if difference <= 8 * torch.finfo(output.dtype).eps:
                continue
            if restored:
                raise ParedError(
                    f"block {name} does not give the same output twice on one input (difference {difference:.2g}): it "
                    f"is random, or keeps a state between calls that cannot be put back; {_DATA_FREE}"
                )
            raise ParedError(
                f"block {name} computes with a state that an earlier run has left on it; load the model again, or "
                "reset the state, before it is calibrated"
            )


def _difference(one: torch.Tensor, other: torch.Tensor) -> float:
    """Return the norm of the difference relative to that of the second; 0 where neither is a finite number."""
    if one.shape != other.shape:
        return math.inf
    if not bool(other.isfinite().all()):
        return 0.0  # the walk names the block that puts it out
    return float((one.double() - other.double()).norm() / other.double().norm().clamp(min=1e-30))
