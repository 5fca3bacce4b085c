"""Which modules hold the experts of a mixture in tensors of three dimensions, and how: proved by running them.

What is told by shapes are candidates (:class:`~pared.modules.opened.Layout`): which of two tensors comes first, whether
they are transposed, what is done between them, how the module is called. A candidate is kept if, on a small stand-in of
the module with random numbers in all its tensors, the experts one by one give what the module itself gives, for random
hidden states, picks and weights. No name decides it, and no weight is read: a plan from shapes finds the same.
"""

import copy
import math
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import permutations, product
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd

from pared.modules.opened import (
    ALL,
    BETWEEN,
    FIRST,
    OWN,
    PICKED,
    PLAIN,
    SECOND,
    Layout,
    OpenedExperts,
    activation_of,
    open_by_layout,
)
from pared.structure.proof import FLOATS, TOLERANCE
from pared.structure.state import OF_TORCH

TOKENS, PICKS = 7, 2  # of the stand-in's call
SMALLEST = 3  # of its sizes
MOST_NUMBERS = 2**24  # of a stand-in of full size, where a small one does not run

# What was found of modules so far, by class and attributes: a model has many of one class, and is looked at repeatedly.
_FOUND: WeakKeyDictionary[type[nn.Module], dict[Hashable, Layout | str]] = WeakKeyDictionary()


@dataclass(frozen=True)
class Openable:
    """A module whose experts can be made layers of their own.

    Attributes:
        name: its full name.
        block: index of the block it lies in.
        experts: how many it holds.
        layout: how.
    """

    name: str
    block: int
    experts: int
    layout: Layout

    @property
    def sites(self) -> list[str]:
        """The full names of the layers that there will be."""
        return [f"{self.name}.{number}.{leaf}" for number in range(self.experts) for leaf in (FIRST, SECOND)]


def openable(blocks: Sequence[nn.Module], path: str) -> list[Openable]:
    """Return the modules of some blocks whose experts can be opened, in the model's order.

    Args:
        blocks: of a model; they may be on the meta device, and are not changed.
        path: name of the list of blocks.
    """
    found: list[Openable] = []
    for index, block in enumerate(blocks):
        for name, module in block.named_modules():
            if name and isinstance(layout := layout_of(module), Layout):
                count = len(module.get_parameter(layout.first))
                found.append(Openable(f"{path}.{index}.{name}", index, count, layout))
    return found


def open_experts(model: nn.Module, found: Sequence[Openable], views: bool = False) -> None:
    """Open experts, in place.

    Args:
        model: of which they are. Memory: one mixture beside the model.
        found: as :func:`openable` returns it.
        views: whether layers are to have the numbers of the mixture themselves, so that nothing is copied.
    """
    for one in found:
        open_by_layout(model, one.name, one.layout, views)


def layout_of(module: nn.Module) -> Layout | str:
    """Return how a module holds experts, or why they stay as they are; "" of one that holds no such tensors.

    The proof runs once in a process for modules of one class, shapes and attributes; a module without tensors of three
    dimensions costs a look at its own parameters.

    Args:
        module: of a block.
    """
    own = {name: one for name, one in module._parameters.items() if one is not None}
    if isinstance(module, (_ConvNd, OpenedExperts)) or not any(one.ndim == 3 for one in own.values()):
        return ""
    attributes = {name: value for name, value in vars(module).items() if name not in OF_TORCH}
    plain = {name: value for name, value in attributes.items() if isinstance(value, (bool, int, float, str))}
    shapes = tuple((name, tuple(one.shape), one.dtype) for name, one in own.items())
    inside = tuple((name, type(child)) for name, child in module._modules.items())
    beside = tuple(name for name, _ in (*module.named_parameters(), *module.named_buffers()) if name not in own)
    hooked = bool(module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module))
    key = (shapes, inside, beside, hooked, tuple(sorted(plain.items())))
    known = _FOUND.setdefault(type(module), {})
    if key not in known:
        known[key] = _found(module, own, beside)
    return known[key]


def _found(module: nn.Module, own: Mapping[str, nn.Parameter], beside: Sequence[str]) -> Layout | str:
    stacks = [name for name, one in own.items() if one.ndim == 3]
    if "forward" in vars(module) or module._forward_hooks or module._forward_pre_hooks:
        return "its module has a forward or a hook of its own"
    if any(type(one) is not nn.Parameter or one.dtype not in FLOATS for one in own.values()):
        return "it is no plain floating point tensor"
    if len(stacks) != 2 or beside or len({len(one) for one in own.values()}) > 1:
        return f"it is not one of two stacks of weights that a module holds alone ({', '.join([*own, *beside])})"
    candidates = list(_candidates(module, own, stacks))
    for numbers in (_small(own), _whole(own)):
        for layout in candidates:
            if numbers is not None and _proved(module, own, numbers, layout):
                return layout
    return "its experts are not two linear layers each, weighed by the router's weights of those picked"


def _candidates(module: nn.Module, own: Mapping[str, nn.Parameter], stacks: list[str]) -> Iterator[Layout]:
    """Yield layouts that go with the shapes; the module's own method before what is guessed of its activation."""
    biases = [name for name, one in own.items() if one.ndim == 2]
    if len(biases) + len(stacks) != len(own) or len(biases) > 2:
        return
    between = [kind for kind in BETWEEN if _has(module, kind)]
    for (first, second), transposed, kind, call in product(permutations(stacks), (False, True), between, (PICKED, ALL)):
        (width, made), (read, out) = (own[name].shape[1:] if transposed else own[name].shape[:0:-1]
                                      for name in (first, second))  # fmt: skip
        if width != out or (made != (read if kind == PLAIN else 2 * read) and not (kind == OWN and made == read)):
            continue
        for first_bias, second_bias in _biases(own, biases, made, out):
            yield Layout(first, second, first_bias, second_bias, transposed, kind, call)


def _has(module: nn.Module, kind: str) -> bool:
    if kind == OWN:
        return callable(getattr(module, "_apply_gate", None))
    return activation_of(module) is not None


def _biases(own: Mapping[str, nn.Parameter], biases: list[str], made: int, out: int) -> Iterator[tuple[str, str]]:
    """Yield which of the parameters may be the biases of the first and the second layers."""
    if not biases:
        yield "", ""
        return
    for first, second in permutations([*biases, ""], 2):
        named = {name for name in (first, second) if name}
        fits = all(own[name].shape[1] == size for name, size in ((first, made), (second, out)) if name)
        if named == set(biases) and fits:
            yield first, second


def _small(own: Mapping[str, nn.Parameter]) -> dict[int, int]:
    """Return a small number for every size there is: equal ones stay equal, and twice another stays that."""
    sizes = sorted({size for one in own.values() for size in one.shape})
    found: dict[int, int] = {}
    for size in sizes:
        half = found.get(size // 2) if size % 2 == 0 else None
        taken = {*found.values(), *(2 * one for one in found.values())}
        fresh = next(one for one in range(SMALLEST, 99) if one not in taken and one * 2 not in taken)
        found[size] = fresh if half is None else 2 * half
    return found


def _whole(own: Mapping[str, nn.Parameter]) -> dict[int, int] | None:
    if sum(one.numel() for one in own.values()) > MOST_NUMBERS:
        return None
    return {size: size for one in own.values() for size in one.shape}


@torch.no_grad()
def _proved(module: nn.Module, own: Mapping[str, nn.Parameter], numbers: Mapping[int, int], layout: Layout) -> bool:
    """Whether experts one by one give what a stand-in of the module does, in whichever order it is given picks."""
    generator = torch.Generator().manual_seed(0)
    hidden, *picks = _call(fused := _stand_in(module, own, numbers, generator), layout, generator)
    opened = OpenedExperts(_stand_in(module, own, numbers, generator, fused), layout)
    for args in (picks, picks[::-1]):
        with suppress(Exception):  # whatever sizes that are not the configuration's lead to
            expected, found = fused(hidden, *args), opened(hidden, *args)
            scale = float(expected.norm())
            off = float((found.double() - expected.double()).norm()) if found.shape == expected.shape else math.inf
            if scale > 0 and off <= TOLERANCE[torch.float32] * scale:
                return True
    return False


def _stand_in(
    module: nn.Module,
    own: Mapping[str, nn.Parameter],
    numbers: Mapping[int, int],
    generator: torch.Generator,
    like: nn.Module | None = None,
) -> nn.Module:
    """Return a module of the same class and attributes, float32, with random numbers or those of another stand-in.

    Attributes that hold one of the sizes hold that of the stand-in.
    """
    new: nn.Module = type(module).__new__(type(module))
    nn.Module.__init__(new)
    for name, value in vars(module).items():
        if name not in OF_TORCH:
            is_size = type(value) is int and value in numbers
            vars(new)[name] = numbers[value] if is_size else value
    for name, child in module._modules.items():
        new._modules[name] = None if child is None else copy.deepcopy(child).to_empty(device="cpu").float()
    for name, one in own.items():
        shape = [numbers[size] for size in one.shape]
        values = torch.randn(shape, generator=generator) if like is None else like.get_parameter(name).detach().clone()
        new._parameters[name] = nn.Parameter(values, requires_grad=False)
    return new.eval()


def _call(fused: nn.Module, layout: Layout, generator: torch.Generator) -> tuple[torch.Tensor, ...]:
    """Return arguments to call a stand-in with."""
    stack = fused.get_parameter(layout.first)
    count, width = len(stack), stack.shape[1 if layout.transposed else 2]
    if layout.call == ALL:
        return (torch.randn(count * TOKENS, width, generator=generator),)
    hidden = torch.randn(TOKENS, width, generator=generator)
    index = torch.rand(TOKENS, count, generator=generator).argsort(dim=1)[:, :PICKS]
    return hidden, index, torch.rand(TOKENS, PICKS, generator=generator) + 0.1
