"""What was computed from a tensor, kept while the tensor is: q, k and v read one input, whose Gram is factored once."""

import weakref
from collections.abc import Callable
from functools import wraps
from typing import Any, NamedTuple, ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")


def once_per_tensor(compute: Callable[P, R]) -> Callable[P, R]:
    """Make a function remember what it has made of tensors.

    What it returns for the very same tensors (objects, not numbers), unchanged since, and equal other arguments is
    returned again, and is not to be changed. It is forgotten with the first of the tensors, so that a holder of that
    decides how long. Nothing is remembered of tensors that gradients are wanted of.

    Args:
        compute: its first argument is a tensor, and what it returns shares no memory with it. Arguments are given by
            position, and those that are no tensors are compared by what they are equal to.
    """
    kept: dict[int, list[tuple[tuple[Any, ...], R]]] = {}

    @wraps(compute)
    def remembering(*args: P.args, **kwargs: P.kwargs) -> R:
        tensors = [one for one in args if isinstance(one, torch.Tensor)]
        first = args[0]
        if kwargs or not tensors or any(one.requires_grad or one.is_inference() for one in tensors):
            return compute(*args, **kwargs)
        for marks, found in kept.get(id(first), ()):
            if len(marks) == len(args) and all(map(_is, marks, args)):
                return found
        result = compute(*args, **kwargs)
        if id(first) not in kept:
            kept[id(first)] = []
            weakref.finalize(first, kept.pop, id(first), None).atexit = False
        kept[id(first)].append((tuple(map(_mark, args)), result))
        return result

    return remembering


class _Seen(NamedTuple):
    """What a tensor is recognised by, without keeping it alive."""

    tensor: weakref.ref[torch.Tensor]
    version: int


def _mark(argument: object) -> object:
    return _Seen(weakref.ref(argument), argument._version) if isinstance(argument, torch.Tensor) else argument


def _is(mark: object, argument: object) -> bool:
    """Whether this is the argument that was marked."""
    if isinstance(mark, _Seen):
        return mark.tensor() is argument and mark.version == getattr(argument, "_version", None)
    return type(mark) is type(argument) and mark == argument
