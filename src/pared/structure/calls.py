"""How a model calls a block, taken apart so that it can be called again."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from transformers import Cache

from pared.errors import ParedError
from pared.structure.state import tensors_in


@dataclass(frozen=True)
class BlockCall:
    """How the model called a block.

    Attributes:
        args: positional arguments after the hidden states, or all but them.
        kwargs: keyword arguments.
        hidden: the hidden states ``(batch, tokens, width)``.
        by_name: the keyword the hidden states came by, or None if they were the first positional argument.
        returns: entries of the tuple the block returned (hidden states first), 0 if it returned the hidden states.
        block: index of the block; one that runs several times in a pass is called as often.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    hidden: torch.Tensor
    by_name: str | None
    returns: int = 0
    block: int = 0

    @classmethod
    def seen(cls, args: tuple[Any, ...], kwargs: dict[str, Any], name: str, block: int) -> "BlockCall":
        """Take a call apart, without a cache of keys and values: it would grow from batch to batch.

        Args:
            args: positional arguments.
            kwargs: keyword arguments.
            name: of the block, for the error.
            block: its index.

        Raises:
            ParedError: no hidden states among the arguments.
        """
        args = tuple(None if isinstance(value, Cache) else value for value in args)
        kwargs = {name: None if isinstance(value, Cache) else value for name, value in kwargs.items()}
        if args and isinstance(args[0], torch.Tensor):
            return cls(args[1:], kwargs, args[0], None, block=block)
        if isinstance(kwargs.get("hidden_states"), torch.Tensor):
            rest = {name: value for name, value in kwargs.items() if name != "hidden_states"}
            return cls(args, rest, kwargs["hidden_states"], "hidden_states", block=block)
        raise ParedError(f"block {name}: called without hidden states; got arguments {sorted(kwargs)}")

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
        return list(tensors_in((self.args, self.kwargs)))


def hidden_of(output: Any) -> torch.Tensor:
    """Return the hidden states of what a block returned."""
    return output[0] if isinstance(output, (tuple, list)) else output


def adapted(call: BlockCall, dtype: torch.dtype, device: torch.device, known: dict[int, torch.Tensor]) -> BlockCall:
    """Return a call whose arguments are of another dtype and place; hidden states are not among them.

    Args:
        call: of a block.
        dtype: of what are floating point numbers.
        device: of all tensors.
        known: tensors that were brought there before, by the identity of what they were; it grows.
    """

    def adapt_tensor(value: torch.Tensor) -> torch.Tensor:
        if not value.is_floating_point():
            return value.to(device)
        # A mask of float32's lowest value must not become -inf in a half dtype.
        limit = min(torch.finfo(dtype).max, torch.finfo(value.dtype).max)
        return value.clamp(-limit, limit).to(device, dtype)

    def adapt(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            if id(value) not in known:
                known[id(value)] = adapt_tensor(value)
            return known[id(value)]
        if isinstance(value, dict):
            return {name: adapt(item) for name, item in value.items()}
        if type(value) in (tuple, list):
            return type(value)(adapt(item) for item in value)
        return value

    return replace(call, args=adapt(call.args), kwargs=adapt(call.kwargs), hidden=call.hidden.new_empty(0))
