"""What a module keeps from one call to the next: put back, so that no batch is seen through what another left behind.

Recurrent blocks keep their state in plain attributes, buffers or the entries of a list. In a calibration every batch
has to start from the same state, and a copy of a block must not carry the graph of a backward pass with it.
"""

import copy
from collections import deque
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import nn

from pared.errors import ParedError

# What torch itself keeps on every module: parameters, children, hooks, modes. Buffers are looked at apart.
OF_TORCH = frozenset(vars(nn.Module()))
_CONTAINERS = (list, dict, set, deque)


class KeptState:
    """Attributes, containers and buffers of some modules, and of all modules inside them, as they are now.

    Attributes that are bound again, added or removed, entries of containers, and tensors that are written to are found
    and put back. What an object of another class holds is not seen: whether a call can be repeated has to be tried.
    Memory: a copy of every buffer.
    """

    def __init__(self, roots: Sequence[nn.Module]) -> None:
        modules = {id(module): module for root in roots for module in root.modules()}
        # Buffers live in a dictionary of their own; both are restored in the same way.
        self._spaces = [(space, dict(space)) for m in modules.values() for space in (_Attributes(m), m._buffers)]
        values = [value for _, before in self._spaces for value in before.values()]
        containers: list[Any] = [value for value in values if isinstance(value, _CONTAINERS)]
        self._entries = [(container, copy.copy(container)) for container in containers]
        tensors = {id(tensor): tensor for value in values for tensor in tensors_in(value)}
        self._written = {
            key: (tensor, tensor._version, tensor.detach().clone())
            for key, tensor in tensors.items()
            if not tensor.is_inference()
        }

    def changes(self) -> list[Any]:
        """Return the former value of everything that is no longer as it was; None for what was not there."""
        found: list[Any] = []
        for space, before in self._spaces:
            now = dict(space)
            found += [before.get(name) for name in now.keys() | before.keys() if now.get(name) is not before.get(name)]
        found += [before for container, before in self._entries if not _same_entries(container, before)]
        return found + [value for tensor, version, value in self._written.values() if tensor._version != version]

    def restore(self) -> None:
        """Put everything back."""
        for space, before in self._spaces:
            if not _same_entries(dict(space), before):
                for name in [name for name in space if name not in before]:
                    del space[name]
                space.update(before)
        for container, entries in self._entries:
            if not _same_entries(container, entries):
                container.clear()
                (container.extend if isinstance(container, (list, deque)) else container.update)(entries)
        with torch.no_grad():
            for key, (tensor, version, value) in self._written.items():
                if tensor._version != version:
                    tensor.detach().copy_(value)
                    self._written[key] = (tensor, tensor._version, value)


class _Attributes(MutableMapping[str, Any]):
    """A module's own attributes, without those of torch, as a dictionary to read and write."""

    def __init__(self, module: nn.Module) -> None:
        self._own = vars(module)

    def __getitem__(self, name: str) -> Any:
        return self._own[name]

    def __setitem__(self, name: str, value: Any) -> None:
        self._own[name] = value

    def __delitem__(self, name: str) -> None:
        del self._own[name]

    def __iter__(self) -> Iterator[str]:
        return iter([name for name in self._own if name not in OF_TORCH])

    def __len__(self) -> int:
        return sum(1 for _ in self)


def copy_block(block: nn.Module, name: str = "", same_parameters: bool = False) -> nn.Module:
    """Return a copy of a block; tensors it keeps from an earlier backward pass are copied without their graph.

    Args:
        block: any module.
        name: for the error.
        same_parameters: whether the copy has the very parameters of the block, not copies of them.

    Raises:
        ParedError: it cannot be copied.
    """
    kept = [tensor for module in block.modules() for tensor in tensors_in(dict(_Attributes(module)))]
    memo = {id(tensor): tensor.detach().clone() for tensor in kept if tensor.grad_fn is not None}
    memo |= {id(parameter): parameter for parameter in block.parameters()} if same_parameters else {}
    try:
        return copy.deepcopy(block, memo)
    except (RuntimeError, TypeError) as error:
        raise ParedError(
            f"block {name or type(block).__name__} cannot be copied ({' '.join(str(error).split())[:120]}); it may "
            "keep results of an earlier run: load the model again, or use a data-free method (svd, magnitude)"
        ) from error


def tensors_in(value: Any) -> Iterator[torch.Tensor]:
    """Yield a tensor, or every tensor in nested containers."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors_in(item)
    elif isinstance(value, (tuple, list, set, deque)):
        for item in value:
            yield from tensors_in(item)


def _same_entries(one: Any, other: Any) -> bool:
    """Whether two containers hold the same objects; tensors are not compared by value."""
    if isinstance(one, Mapping):
        return list(one) == list(other) and all(one[key] is other[key] for key in one)
    if isinstance(one, set):
        return {id(item) for item in one} == {id(item) for item in other}
    return len(one) == len(other) and all(a is b for a, b in zip(one, other, strict=True))
