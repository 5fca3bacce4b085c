"""Experts of a mixture, one by one: two linear layers each, in place of tensors that hold those of all experts.

transformers 5 holds the experts of a block in parameters of three dimensions, ``(experts, out, in)`` or
``(experts, in, out)``. Opened, expert j is the child ``j`` of the module that stood there, with layers ``first`` and
``second``, so that each of them can be made smaller by itself. How the tensors lie is found and proved elsewhere; what
is found is a :class:`Layout`, by which a folder's map makes the same modules again.

Legend of the shape suffixes: T tokens, P experts picked for each, H the width, M what ``first`` outputs.
"""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

FIRST, SECOND = "first", "second"
# What is done between the two layers: by a method of the module that stood there, or its one activation on the first
# or on the even half of what the first layer outputs, times the other half, or on all of it.
OWN, HALVES, PAIRS, PLAIN = "own", "halves", "pairs", "plain"
BETWEEN = (OWN, HALVES, PAIRS, PLAIN)
PICKED, ALL = "picked", "all"
CALLS = (PICKED, ALL)


@dataclass(frozen=True)
class Layout:
    """How a module holds its experts.

    Attributes:
        first: name of the parameter with the first layers of all experts.
        second: that of the second layers.
        first_bias: name of the parameter with the biases of the first layers, "" if there are none.
        second_bias: that of the second layers'.
        transposed: whether the parameters are ``(experts, in, out)``.
        between: what is done between the layers, one of :data:`BETWEEN`.
        call: ``picked`` where the module is called with hidden states ``(T, H)``, the numbers of the experts picked and
            their weights ``(T, P)`` each; ``all`` where it is called with what each expert reads ``(experts * T, H)``.
    """

    first: str
    second: str
    first_bias: str
    second_bias: str
    transposed: bool
    between: str
    call: str = PICKED

    def entry(self) -> dict[str, Any]:
        """Return it as a checkpoint's map has it."""
        return asdict(self)

    @property
    def names(self) -> tuple[str, ...]:
        """The parameters that it names."""
        return tuple(name for name in (self.first, self.second, self.first_bias, self.second_bias) if name)


class Between:
    """What experts do between their layers: ``(..., M)`` to what the second layer reads.

    Args:
        fused: the module that stood there; nothing of its parameters is used.
        kind: one of :data:`BETWEEN`.
    """

    def __init__(self, fused: nn.Module, kind: str) -> None:
        self.fused, self.kind = fused, kind

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Return what the second layer reads."""
        fused: Any = self.fused
        if self.kind == OWN:
            made: torch.Tensor = fused._apply_gate(x)
            return made
        activation = activation_of(fused)
        assert activation is not None
        if self.kind == PLAIN:
            return activation(x)
        gate, up = x.chunk(2, dim=-1) if self.kind == HALVES else (x[..., ::2], x[..., 1::2])
        return activation(gate) * up


def activation_of(fused: nn.Module) -> Callable[[torch.Tensor], torch.Tensor] | None:
    """Return the one activation of a module: its only child, or its only attribute that is a function."""
    found: list[Any] = [child for child in fused._modules.values() if child is not None]
    functions = [one for one in vars(fused).values() if callable(one) and not isinstance(one, (type, nn.Module))]
    found += functions if not found else []
    return found[0] if len(found) == 1 else None


class Expert(nn.Module):
    """One expert: what it makes of tokens that it is given.

    Args:
        first: its first layer.
        second: its second layer.
        between: what is done between them.

    Attributes:
        inputs: of the layer that reads more, as they are made.
    """

    def __init__(self, first: nn.Linear, second: nn.Linear, between: Between) -> None:
        super().__init__()
        self.first: nn.Module = first
        self.second: nn.Module = second
        self.between = between
        self.inputs = max(first.in_features, second.in_features)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return what it makes of ``(..., H)``."""
        made: torch.Tensor = self.second(self.between(self.first(x)))
        return made


class OpenedExperts(nn.Module):
    """The experts of one block, each with layers of its own; called as the module that stood there.

    Args:
        fused: that module. It is kept without its numbers: it says what experts do between their layers, and which
            shapes its parameters have, for :func:`close`.
        layout: how it held them.
        views: whether the layers are to have the numbers of ``fused`` themselves, and not a copy.

    Attributes:
        layout: as given.
        count: how many experts there are.
        picked: how many of them a token is given to at most, as a run of shapes tells.
    """

    def __init__(self, fused: nn.Module, layout: Layout, views: bool = False) -> None:
        super().__init__()
        self.layout = layout
        between = Between(fused, layout.between)
        self.count = len(fused._parameters[layout.first])  # type: ignore[arg-type]
        for number, (first, second) in enumerate(_split(fused, layout, views)):
            self.add_module(str(number), Expert(first, second, between))
        self.picked = self.count  # until a run of shapes tells
        self._fused = (fused,)  # in a tuple: it is no module of the model any more
        if not views:
            empty_out(fused, layout)
        self.train(fused.training)

    @property
    def fused(self) -> nn.Module:
        """The module that stood there."""
        return self._fused[0]

    @property
    def experts(self) -> tuple[Expert, ...]:
        """All experts, in order."""
        return tuple(self._modules.values())  # type: ignore[arg-type]

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Return what the experts make of tokens, ``(T, H)``, or of all that each reads, ``(experts * T, H)``."""
        given = [one for one in (*args, *kwargs.values()) if isinstance(one, torch.Tensor)]
        if self.layout.call == ALL:
            return self._of_all(*given)
        (index_TP,) = (one for one in given if not one.is_floating_point())
        (weights_TP,) = (one for one in given if one is not index_TP and one.shape == index_TP.shape)
        (hidden_TH,) = (one for one in given if one is not index_TP and one is not weights_TP)
        dtype = torch.float32 if hidden_TH.dtype.itemsize < torch.float32.itemsize else hidden_TH.dtype
        total_TH = torch.zeros_like(hidden_TH, dtype=dtype)
        for number, token, place in self._routed(index_TP):
            made = self._modules[str(number)](_rows(hidden_TH, token)) * weights_TP[token, place, None]  # type: ignore[misc]
            total_TH.index_add_(0, token, made.to(dtype))
        return total_TH.to(hidden_TH.dtype)

    def _routed(self, index_TP: torch.Tensor) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
        """Yield the experts that are picked, with the tokens of each and its place among those picked for them."""
        if index_TP.is_meta:  # a run of shapes: every expert is given as many tokens
            self.picked = min(index_TP.shape[1], self.count)
            each = index_TP.new_zeros(max(1, index_TP.numel() // self.count))
            yield from ((number, each, each) for number in range(self.count))
            return
        for number in index_TP.unique().tolist():  # type: ignore[no-untyped-call]
            if 0 <= number < self.count:  # others stand for none
                token, place = torch.where(index_TP == number)
                yield number, token, place

    def _of_all(self, reads: torch.Tensor) -> torch.Tensor:
        """Return what each expert makes of its part; of rows of zeros, which it was not given, nothing but zeros."""
        if reads.is_meta:
            return torch.cat(
                [one(part.clone()) for one, part in zip(self.experts, reads.chunk(self.count), strict=True)]
            )
        parts = reads.view(self.count, -1, reads.shape[-1])
        made = []
        for one, part in zip(self.experts, parts, strict=True):
            (token,) = torch.where((part != 0).any(dim=-1))
            rows = torch.zeros_like(part)
            made.append(rows.index_add_(0, token, one(part[token]).to(rows.dtype)) if len(token) else rows)
        return torch.cat(made)


def _rows(hidden_TH: torch.Tensor, token: torch.Tensor) -> torch.Tensor:
    return hidden_TH.new_empty(len(token), hidden_TH.shape[-1]) if hidden_TH.is_meta else hidden_TH[token]


def _split(fused: nn.Module, layout: Layout, views: bool) -> Iterator[tuple[nn.Linear, nn.Linear]]:
    """Yield the two layers of every expert."""
    for number in range(len(fused._parameters[layout.first])):  # type: ignore[arg-type]
        pairs = ((layout.first, layout.first_bias), (layout.second, layout.second_bias))
        first, second = (_layer(fused, name, bias, layout.transposed, number, views) for name, bias in pairs)
        yield first, second


def _layer(fused: nn.Module, name: str, bias: str, transposed: bool, number: int, views: bool) -> nn.Linear:
    stack = fused.get_parameter(name)
    one = stack.detach()[number]
    weight = one.T if transposed else one
    layer: nn.Linear = nn.Linear.__new__(nn.Linear)
    nn.Module.__init__(layer)
    layer.out_features, layer.in_features = weight.shape
    layer.weight = nn.Parameter(_own(weight, views), requires_grad=stack.requires_grad)
    biases = fused.get_parameter(bias) if bias else None
    own = None if biases is None else nn.Parameter(_own(biases.detach()[number], views), biases.requires_grad)
    layer.register_parameter("bias", own)
    return layer


def _own(tensor: torch.Tensor, views: bool) -> torch.Tensor:
    return tensor if views else tensor.clone(memory_format=torch.contiguous_format)


def empty_out(fused: nn.Module, layout: Layout) -> None:
    """Leave a module the shapes of its parameters, and give up their numbers."""
    for name in layout.names:
        old = fused.get_parameter(name)
        fused._parameters[name] = nn.Parameter(torch.empty_like(old, device="meta"), requires_grad=old.requires_grad)


def opened_experts(root: nn.Module, prefix: str = "") -> dict[str, OpenedExperts]:
    """Return the opened experts of a model or a block, by name."""
    return {name: one for name, one in root.named_modules(prefix=prefix) if isinstance(one, OpenedExperts)}


def experts_map(root: nn.Module, prefix: str = "") -> dict[str, dict[str, Any]]:
    """Return the layouts of all opened experts of a model or a block, as a checkpoint's map has them."""
    return {name: one.layout.entry() for name, one in opened_experts(root, prefix).items()}


def open_by_layout(root: nn.Module, path: str, layout: Layout, views: bool = False) -> OpenedExperts:
    """Open the experts of one module, in place.

    Args:
        root: a model or a block; it may be on the meta device.
        path: of the module in it.
        layout: how it holds its experts.
        views: as for :class:`OpenedExperts`.

    Returns:
        What stands there now.

    Raises:
        ValueError: the module does not hold such tensors.
    """
    fused = root.get_submodule(path)
    require_layout(fused, layout)
    new = OpenedExperts(fused, layout, views)
    parent, _, leaf = path.rpartition(".")
    setattr(root.get_submodule(parent), leaf, new)
    return new


def require_layout(fused: nn.Module, layout: Layout) -> None:
    """Refuse a module whose parameters are not those of a layout.

    Raises:
        ValueError: says what is there.
    """
    own = {name: tuple(one.shape) for name, one in fused._parameters.items() if one is not None}
    stacks = [own.get(name, ()) for name in (layout.first, layout.second)]
    fits = {len(shape) for shape in stacks} == {3} and len({shape[0] for shape in stacks}) == 1
    if fits:
        outs = [shape[2 if layout.transposed else 1] for shape in stacks]
        biases = {layout.first_bias: outs[0], layout.second_bias: outs[1]}
        fits = all(own.get(name) == (stacks[0][0], out) for name, out in biases.items() if name)
    if not fits or own.keys() != set(layout.names):
        raise ValueError(f"got parameters {own}, expected experts in {', '.join(layout.names)}")


@torch.no_grad()
def close(root: nn.Module, path: str) -> nn.Module:
    """Put the module back that held all experts, with the numbers that they have now, in place.

    Args:
        root: a model or a block.
        path: of the opened experts in it.

    Returns:
        The module.

    Raises:
        ValueError: a layer of an expert is not a linear layer of the size that it had.
    """
    opened = root.get_submodule(path)
    assert isinstance(opened, OpenedExperts)
    fused, layout = opened.fused, opened.layout
    for leaf, name, bias in ((FIRST, layout.first, layout.first_bias), (SECOND, layout.second, layout.second_bias)):
        layers = [getattr(one, leaf) for one in opened.experts]
        shape = fused.get_parameter(name).shape[1:]
        expected = tuple(shape[::-1] if layout.transposed else shape)
        for number, layer in enumerate(layers):
            if (
                type(layer) is not nn.Linear
                or tuple(layer.weight.shape) != expected
                or (layer.bias is None) == bool(bias)
            ):
                raise ValueError(f"{path}.{number}.{leaf} is {layer}, expected a linear layer of weight {expected}")
        _stack(fused, name, [one.weight.T if layout.transposed else one.weight for one in layers], layers[0].weight)
        if bias:
            _stack(fused, bias, [one.bias for one in layers], layers[0].bias)
    return put_back(root, path)


def put_back(root: nn.Module, path: str) -> nn.Module:
    """Put the module back that stood where opened experts stand, as it is; return it."""
    opened = root.get_submodule(path)
    assert isinstance(opened, OpenedExperts)
    parent, _, leaf = path.rpartition(".")
    setattr(root.get_submodule(parent), leaf, opened.fused.train(opened.training))
    return opened.fused


def _stack(fused: nn.Module, name: str, parts: list[torch.Tensor], like: nn.Parameter) -> None:
    fused._parameters[name] = nn.Parameter(torch.stack(parts), requires_grad=like.requires_grad)
