"""Several modules with one basis: the weights of their ``down`` are one parameter.

Parameters are tied, never one module put under two parents: transformers initialises the latter again on loading. What
replaces the weight of one of them by a packed one (torchao's ``quantize_``, layer by layer) gives all of them the same.
"""

from functools import partial
from typing import Any, NoReturn

from torch import nn

DOWN = ".down.weight"  # what a shared basis is called, behind the name of its module
BECAME = "_pared_became"  # attribute of a parameter: what was put in its place


class BasisHolder(nn.Module):
    """A module whose ``down`` may be shared, and then lets no adapter on it be merged.

    A merged adapter is added to the one tensor of all members, once for each of them: every one of them would be wrong.

    Attributes:
        shares: name of the tensor that ``down.weight`` is in every member of the group, None if it is not shared.
    """

    shares: str | None = None
    down: Any

    def __setattr__(self, name: str, value: Any) -> None:
        """Set as torch does; what PEFT wraps around a shared ``down`` gets a ``merge`` that refuses."""
        super().__setattr__(name, value)
        if name == "down" and self.shares is not None and hasattr(value, "merge"):
            value.merge = partial(_refuse_merge, self.shares)


class SharedDown(nn.Linear):
    """A ``down`` whose weight others have too: quantised in place, it is the same tensor for all of them still."""

    def __setattr__(self, name: str, value: Any) -> None:
        """Set as torch does; where a weight becomes a tensor of another class, all that had it get the first such."""
        old = self._parameters.get("weight") if name == "weight" else None
        if type(old) is nn.Parameter and isinstance(value, nn.Parameter) and type(value) is not nn.Parameter:
            first = getattr(old, BECAME, None)
            if first is not None and type(first) is type(value) and first.shape == value.shape:
                value = first
            else:
                setattr(old, BECAME, value)
        super().__setattr__(name, value)


def share(member: nn.Module, owner: nn.Module, tensor: str) -> None:
    """Make ``down.weight`` of one module that of another, one parameter.

    Args:
        member: the module that gets it.
        owner: the module that has it.
        tensor: full name of the owner's ``down.weight``.

    Raises:
        ValueError: there is no ``down`` in one of them, or the shapes differ.
    """
    shapes = [None if (down := _down(module)) is None else tuple(down.weight.shape) for module in (member, owner)]
    if None in shapes or shapes[0] != shapes[1]:
        raise ValueError(f"cannot share {tensor} {shapes[1]} with a `down` of shape {shapes[0]}; they must be equal")
    _down(member).weight = _down(owner).weight
    for module in (member, owner):
        module.shares = tensor  # type: ignore[assignment]
        if type(_down(module)) is nn.Linear:
            _down(module).__class__ = SharedDown
        module.down = module.down  # where it is wrapped already


def _down(module: nn.Module) -> Any:
    return module.down


def _refuse_merge(tensor: str, *_: object, **__: object) -> NoReturn:
    raise ValueError(
        f"an adapter on a shared `down` cannot be merged: its weight is {tensor}, one tensor of several layers, and "
        "every layer's change would land in it; keep the adapter unmerged, or train one that targets `up`"
    )
