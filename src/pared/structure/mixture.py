"""Mixtures of experts: tensors with one entry for every expert, and the router that picks some of them a token.

Experts of transformers 5 are parameters of three dimensions, ``(experts, out, in)``, of one module, which is called
with what tokens read, the numbers of the experts picked for each, and their weights. Which these are is told by shapes
here, and proved on the blocks by :mod:`pared.structure.experts`; no name decides it.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd

from pared.structure.groups import Count, RefusedError
from pared.structure.model import KINDS, Anatomy
from pared.structure.probe import StopForwardError, hooks, replaced_forwards, runs_of_shapes


@dataclass(frozen=True)
class Stack:
    """A tensor that has one entry for every expert, along its first dimension.

    Attributes:
        module: full name of the module that holds it.
        leaf: its name there.
        shape: of it, experts first.
        parameter: whether it is one, and not a buffer.
    """

    module: str
    leaf: str
    shape: tuple[int, ...]
    parameter: bool = True

    @property
    def name(self) -> str:
        """Its full name."""
        return f"{self.module}.{self.leaf}"

    @property
    def rows(self) -> int:
        """Rows of one expert, where all are seen as one tall weight."""
        return self.shape[1] if len(self.shape) > 2 else 1

    @property
    def columns(self) -> int:
        """Columns of that weight."""
        return self.shape[-1] if len(self.shape) > 1 else 1

    @property
    def kind(self) -> str:
        """What it is usually called, to print."""
        return KINDS.get(self.leaf, self.leaf)


@dataclass(frozen=True)
class Mixture:
    """The experts of one block with their router.

    Attributes:
        name: full name of the module that holds the experts.
        root: full name of the module that holds it and the router.
        block: index of the block.
        experts: how many there are.
        own: the experts' tensors.
        router: those of the router.
        counts: attributes of modules that hold the number of experts; once it is proved, with which fewer run.
        picked: how many experts a token is given to; 0 before that is seen.
        rescales: whether taking an expert out changes the weights of tokens that were not given to it: the router
            shares weights out over all experts, and does not normalise those of the picked ones.
    """

    name: str
    root: str
    block: int
    experts: int
    own: tuple[Stack, ...]
    router: tuple[Stack, ...]
    counts: tuple[Count, ...] = ()
    picked: int = 0
    rescales: bool = False

    @property
    def stacks(self) -> tuple[Stack, ...]:
        """All tensors that lose what an expert has."""
        return *self.own, *self.router


def mixtures_by_shape(blocks: Sequence[nn.Module], anatomy: Anatomy) -> list[Mixture]:
    """Return what may be mixtures of experts, told by shapes: blocks may be on the meta device."""
    layers = {layer.name for layer in anatomy.layers}
    return [
        found
        for index, block in enumerate(blocks)
        for path, module in block.named_modules()
        if path and (found := _mixture(block, path, module, index, anatomy.block_name(index), layers)) is not None
    ]


def _mixture(block: nn.Module, path: str, module: nn.Module, index: int, name: str, layers: set[str]) -> Mixture | None:
    """Return the mixture of which a module may hold the experts; None if it holds none, or nothing picks them."""
    sizes = {len(one) for one in module._parameters.values() if one is not None and one.ndim == 3}
    if len(sizes) != 1 or isinstance(module, _ConvNd) or (experts := sizes.pop()) < 2:
        return None
    above = path.rpartition(".")[0]
    root = block.get_submodule(above)
    full = f"{name}.{above}".rstrip(".")
    inside = f"{name}.{path}"
    stacks = list(_stacks(root, full, experts))
    own = tuple(one for one in stacks if f"{one.module}.".startswith(f"{inside}."))
    rest = [one for one in stacks if one not in own]
    router = [one for one in rest if one.module not in layers] or rest  # which may be a linear layer
    if not any(len(one.shape) == 2 for one in router):
        return None
    counts = tuple(
        Count(f"{full}.{part}".rstrip("."), attribute, 1)
        for part, owner in root.named_modules()
        for attribute, value in vars(owner).items()
        if type(value) is int and value == experts
    )
    return Mixture(inside, full, index, experts, own, tuple(router), counts)


def _stacks(root: nn.Module, name: str, experts: int) -> Iterator[Stack]:
    """Yield the parameters and the buffers of a module, and of those inside, with an entry for every expert."""
    for path, module in root.named_modules():
        full = f"{name}.{path}".rstrip(".")
        for leaf, one in (*module._parameters.items(), *module._buffers.items()):
            if one is not None and one.ndim and len(one) == experts and leaf not in module._non_persistent_buffers_set:
                yield Stack(full, leaf, tuple(one.shape), leaf in module._parameters)


@dataclass(frozen=True)
class Routed:
    """A call of the module that holds the experts, taken apart.

    Attributes:
        args: positional arguments.
        kwargs: keyword arguments.
        hidden: where among them is what the tokens read ``(T, width)``.
        index: where the numbers of the picked experts are ``(T, picked)``.
        weights: where their weights are, of the same shape.
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    hidden: int | str
    index: int | str
    weights: int | str

    @classmethod
    def seen(cls, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> "Routed":
        """Take a call apart.

        Raises:
            RefusedError: it is no call with hidden states, numbers of experts and their weights.
        """
        places: dict[int | str, Any] = dict([*enumerate(args), *kwargs.items()])
        given = {place: one for place, one in places.items() if isinstance(one, torch.Tensor)}
        whole = [place for place, one in given.items() if not one.is_floating_point() and one.ndim == 2]
        if len(whole) == 1:
            shape = given[whole[0]].shape
            floats = {place: one for place, one in given.items() if one.is_floating_point() and one.ndim == 2}
            weights = [place for place, one in floats.items() if one.shape == shape]
            hidden = [place for place, one in floats.items() if one.shape != shape and len(one) == shape[0]]
            if len(weights) == len(hidden) == 1:
                return cls(args, kwargs, hidden[0], whole[0], weights[0])
        raise RefusedError(
            "its experts are not called with what tokens read, the numbers of the experts picked and their weights"
        )

    def __getitem__(self, place: int | str) -> torch.Tensor:
        found: torch.Tensor = self.args[place] if isinstance(place, int) else self.kwargs[place]
        return found

    @property
    def picks(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The numbers of the picked experts and their weights, each ``(T, picked)``."""
        return self[self.index], self[self.weights]

    def run(self, experts: nn.Module, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Return what experts make of other tokens, ``(T, width)``."""
        given = {self.hidden: hidden, self.index: index.to(self[self.index].dtype), self.weights: weights}
        args = [given.get(place, one) for place, one in enumerate(self.args)]
        made: torch.Tensor = experts(*args, **{name: given.get(name, one) for name, one in self.kwargs.items()})
        return made


class Placed:
    """A mixture in a block, or in a copy of it.

    Args:
        mixture: which one.
        block: that it lies in.
        name: of the block in the model.

    Attributes:
        mixture: as given.
        root: the module that holds router and experts.
        experts: the module that holds the experts.
    """

    def __init__(self, mixture: Mixture, block: nn.Module, name: str) -> None:
        self.mixture, self._block, self._name = mixture, block, name
        self.root, self.experts = self._module(mixture.root), self._module(mixture.name)

    def _module(self, name: str) -> nn.Module:
        return self._block.get_submodule(name.removeprefix(self._name).removeprefix("."))

    @contextmanager
    def keeping(self, kept_K: torch.Tensor, router_alone: bool = False) -> Iterator[None]:
        """Have some experts alone, in the order given, for the length of a ``with`` block.

        Args:
            kept_K: numbers of those that stay.
            router_alone: whether the experts are all there, and only the router knows no others.
        """
        mixture = self.mixture
        with ExitStack() as stack:
            for one in mixture.router if router_alone else mixture.stacks:
                stack.enter_context(_sliced(self._module(one.module), one, kept_K))
            for count in mixture.counts:
                if not (router_alone and f"{count.module}.".startswith(f"{mixture.name}.")):
                    own = vars(self._module(count.module))
                    stack.enter_context(_held(own, count.attribute, count.each * len(kept_K)))
            yield

    def rerouted(
        self, kept_K: torch.Tensor, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return which experts the router picks where it knows some alone, and their weights; no expert runs.

        Args:
            kept_K: numbers of those that it knows.
            args: of a call of the root.
            kwargs: of it.

        Returns:
            Numbers among all experts, and weights, each ``(T, picked)``.
        """
        seen: list[Routed] = []

        def stub(*own: Any, **named: Any) -> Any:
            seen.append(Routed.seen(own, named))
            raise StopForwardError

        try:
            with self.keeping(kept_K, router_alone=True), replaced_forwards([self.experts], lambda _: stub):
                self.root(*args, **kwargs)
        except StopForwardError:
            pass
        if not seen:
            raise RefusedError("its experts do not run")
        index, weights = seen[0].picks
        return kept_K.to(index.device)[index.long()], weights

    @contextmanager
    def mapped(self, kept_K: torch.Tensor) -> Iterator[None]:
        """Have all experts there for a router that knows some alone, for the length of a ``with`` block."""

        def renumber(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            call = Routed.seen(args, kwargs)
            index = call[call.index]
            other = kept_K.to(index.device)[index.long()].to(index.dtype)
            return (
                tuple(other if place == call.index else one for place, one in enumerate(args)),
                {name: other if name == call.index else one for name, one in kwargs.items()},
            )

        with (
            self.keeping(kept_K, router_alone=True),
            hooks([self.experts.register_forward_pre_hook(renumber, with_kwargs=True)]),
        ):
            yield


@contextmanager
def _sliced(module: nn.Module, stack: Stack, kept_K: torch.Tensor) -> Iterator[None]:
    """Have some entries of a tensor alone for the length of a ``with`` block."""
    space: Any = module._parameters if stack.parameter else module._buffers
    before = space[stack.leaf]
    some = before.detach()[kept_K.to(before.device)]
    with _held(space, stack.leaf, nn.Parameter(some, before.requires_grad) if stack.parameter else some):
        yield


@contextmanager
def _held(space: Any, name: str, value: Any) -> Iterator[None]:
    before = space[name]
    space[name] = value
    try:
        yield
    finally:
        space[name] = before


def seen_as(mixture: Mixture, counts: Sequence[Count], picked: int, rescales: bool) -> Mixture:
    """Return a mixture with what was found of it by running its block."""
    return replace(mixture, counts=tuple(counts), picked=picked, rescales=rescales)


def with_picks(model: nn.Module, mixtures: Sequence[Mixture]) -> list[Mixture]:
    """Return mixtures with how many experts a token is given to, as shapes tell it.

    Args:
        model: on the meta device. Its routers run, and no expert does.
        mixtures: of it; those that it does not run on the meta device are as they were.
    """
    picked: dict[str, int] = {}

    def stub(place: int) -> Any:
        def forward(*args: Any, **kwargs: Any) -> torch.Tensor:
            routed = Routed.seen(args, kwargs)
            picked[mixtures[place].name] = routed.picks[0].shape[1]
            return torch.empty_like(routed[routed.hidden])

        return forward

    with replaced_forwards([model.get_submodule(one.name) for one in mixtures], stub):
        for run in runs_of_shapes(model):
            run()
            if len(picked) == len(mixtures):
                break
    return [replace(one, picked=picked.get(one.name, one.picked)) for one in mixtures]
