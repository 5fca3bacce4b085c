"""One pass of a few tokens through the real model: who reads what, and whether the blocks are a plain chain."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from transformers import Cache, PreTrainedModel

from pared.anatomy.structure import Anatomy
from pared.errors import ParedError

PROBE_TOKENS = 8


class StopForwardError(Exception):
    """Ends a forward pass once what was wanted has been seen; the head is never run."""


@dataclass(frozen=True)
class BlockCall:
    """How the model called a block.

    Attributes:
        args: positional arguments after the hidden states, or all but them.
        kwargs: keyword arguments.
        hidden: the hidden states ``(batch, tokens, width)``.
        by_name: the keyword the hidden states came by, or None if they were the first positional argument.
        returns: entries of the tuple the block returned (hidden states first), 0 if it returned the hidden states.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    hidden: torch.Tensor
    by_name: str | None
    returns: int = 0

    @classmethod
    def seen(cls, args: tuple[Any, ...], kwargs: dict[str, Any], block: str) -> "BlockCall":
        """Take a call apart, without a cache of keys and values: it would grow from batch to batch.

        Raises:
            ParedError: no hidden states among the arguments.
        """
        args = tuple(None if isinstance(value, Cache) else value for value in args)
        kwargs = {name: None if isinstance(value, Cache) else value for name, value in kwargs.items()}
        if args and isinstance(args[0], torch.Tensor):
            return cls(args[1:], kwargs, args[0], None)
        if isinstance(kwargs.get("hidden_states"), torch.Tensor):
            rest = {name: value for name, value in kwargs.items() if name != "hidden_states"}
            return cls(args, rest, kwargs["hidden_states"], "hidden_states")
        raise ParedError(f"block {block}: called without hidden states; found arguments {sorted(kwargs)}")

    def run(self, block: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        """Call a block the same way on other hidden states and return the hidden states it makes."""
        if self.by_name is None:
            return hidden_of(block(hidden, *self.args, **self.kwargs))
        return hidden_of(block(*self.args, **{self.by_name: hidden}, **self.kwargs))

    def answer(self, hidden: torch.Tensor) -> Any:
        """Return hidden states in the form the block returns its own; whatever else it returns is None."""
        return (hidden, *[None] * (self.returns - 1)) if self.returns else hidden

    def tensors(self) -> list[torch.Tensor]:
        """Return every tensor among the other arguments, nested ones included."""
        return list(_tensors((self.args, self.kwargs)))


def hidden_of(output: Any) -> torch.Tensor:
    """Return the hidden states of what a block returned."""
    return output[0] if isinstance(output, (tuple, list)) else output


@torch.no_grad()
def run_model(model: PreTrainedModel, tokens: torch.Tensor, beside: Mapping[str, torch.Tensor] | None = None) -> None:
    """Run the model on ``tokens (batch, length)`` without a cache until a hook stops it."""
    with suppress(StopForwardError):
        call_model(model, tokens, beside)


def call_model(model: PreTrainedModel, tokens: torch.Tensor, beside: Mapping[str, torch.Tensor] | None = None) -> Any:
    """Return what the model puts out for ``tokens (batch, length)``, without a cache.

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
    if hasattr(model.config, "use_cache"):
        more["use_cache"] = False
    try:
        return model(input_ids=tokens.to(device), **more)
    except (TypeError, ValueError, RuntimeError, IndexError, AttributeError) as error:
        given = f"token ids with {' and '.join(beside)}" if beside else "token ids alone"
        raise ParedError(
            f"{type(model).__name__} cannot be run on {given} ({type(error).__name__}: "
            f"{' '.join(str(error).split())[:160]}); this architecture is not supported"
        ) from error


@contextmanager
def hooks(handles: Iterator[Any]) -> Iterator[None]:
    """Keep hooks for the length of a ``with`` block, whatever happens inside."""
    with ExitStack() as stack:
        for handle in handles:
            stack.callback(handle.remove)
        yield


def probe(model: PreTrainedModel, anatomy: Anatomy, read: bool = True) -> tuple[Anatomy, list[BlockCall]]:
    """Run a few tokens through the model and record which sites read the same tensor.

    Args:
        model: the whole model.
        anatomy: of it.
        read: whether anything of what the blocks read is needed; if not, they may be blocks that no token reaches.

    Returns:
        The anatomy with ``reads`` and ``idle`` filled in, and how each block was called; the anatomy as it was and no
        calls, where no token reaches the blocks.

    Raises:
        ParedError: the blocks are not a chain, each run once on the output of the one before, or never run.
    """
    watch = _Watch(anatomy)
    blocks = anatomy.blocks(model)
    vocabulary = model.get_input_embeddings().weight.shape[0]
    tokens = torch.arange(PROBE_TOKENS).remainder(vocabulary).unsqueeze(0)

    def handles() -> Iterator[Any]:
        for index, block in enumerate(blocks):
            yield block.register_forward_pre_hook(watch.enter(index), with_kwargs=True)
            yield block.register_forward_hook(watch.leave(last=index == len(blocks) - 1))
        for site in anatomy.sites:
            yield model.get_submodule(site.name).register_forward_pre_hook(watch.read(site.name))

    with hooks(handles()):
        run_model(model, tokens)
    if not watch.order:
        if not read:
            return anatomy, []
        raise ParedError(
            f"the blocks of {anatomy.blocks_path} are not run on text, so nothing can be calibrated on it; use a "
            "method that reads no text (svd, magnitude, with uniform allocation)"
        )
    watch.require_chain(len(blocks))
    return watch.result(), watch.calls


class _Watch:
    """What the hooks of the probe pass write down."""

    def __init__(self, anatomy: Anatomy) -> None:
        self.anatomy = anatomy
        self.calls: list[BlockCall] = []
        self.order: list[int] = []
        self.previous: torch.Tensor | None = None
        self.version = 0
        self.readers: dict[str, list[str]] = {}  # site -> first reader of the tensor, once for every call
        self.alive: dict[tuple[int, ...], tuple[torch.Tensor, str]] = {}  # holds tensors: no address is used twice

    def enter(self, index: int) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            name = self.anatomy.block_name(index)
            call = BlockCall.seen(args, kwargs, name)
            before = self.previous
            if before is not None and not (
                before._version == self.version and (call.hidden is before or torch.equal(call.hidden, before))
            ):
                raise ParedError(
                    f"block {name} does not read the output of the block before it; blocks with other wiring between "
                    "them are not supported"
                )
            self.order.append(index)
            self.calls.append(call)
            self.alive.clear()

        return hook

    def leave(self, last: bool) -> Any:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            self.previous = hidden_of(output)
            self.version = self.previous._version  # moves when it is changed in place
            entries = len(output) if isinstance(output, (tuple, list)) else 0
            self.calls[-1] = replace(self.calls[-1], returns=entries)
            if last:
                raise StopForwardError

        return hook

    def read(self, name: str) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
            seen: torch.Tensor = args[0]
            storage = seen.untyped_storage().data_ptr()
            key = (storage, int(seen.storage_offset()), seen.numel(), seen.shape[-1], seen._version)
            first = self.alive.setdefault(key, (seen, name))
            self.readers.setdefault(name, []).append(first[1])

        return hook

    def require_chain(self, blocks: int) -> None:
        if self.order != list(range(blocks)):
            raise ParedError(
                f"the {blocks} blocks of {self.anatomy.blocks_path} ran in the order {self.order[:8]}..., not once "
                "each from first to last; this architecture is not supported"
            )

    def result(self) -> Anatomy:
        sites = []
        for site in self.anatomy.sites:
            seen = self.readers.get(site.name, [])
            once = len(seen) == 1 and len(self.readers.get(seen[0], [])) == 1
            sites.append(replace(site, reads=seen[0] if once else site.name, idle=not seen))
        return replace(self.anatomy, sites=tuple(sites))


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item)
