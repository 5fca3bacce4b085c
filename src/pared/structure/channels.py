"""Channels of an MLP: inputs of one layer that come, element by element, from outputs of others.

Such an input can be taken out together with the rows that make it, and what is left is a smaller layer of the same
kind. Which layers these are is found by structure and proved on the blocks themselves: what the producers output is
replaced by numbers of our choice, and what reaches the consumer is looked at.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from torch.nn import functional

from pared.structure.calls import BlockCall
from pared.structure.linear import bias_of, weight_of
from pared.structure.model import Anatomy, Site
from pared.structure.probe import hooks, replaced_forwards
from pared.structure.proof import TOLERANCE
from pared.structure.state import KeptState

Layout = Literal["apart", "interleaved"]
Outputs = dict[str, torch.Tensor]  # what layers are made to output, by name


@dataclass(frozen=True)
class Producer:
    """A layer whose outputs make channels.

    Attributes:
        site: the layer.
        rows: of its outputs that make one channel; 2 of a fused gate and up.
        layout: where those of channel j are: ``apart``, at j, j + d, ...; ``interleaved``, at rows · j, rows · j + 1.
    """

    site: Site
    rows: int = 1
    layout: Layout = "apart"

    @property
    def parts(self) -> int:
        """Of how many parts with an output for every channel the outputs consist, one after the other."""
        return self.rows if self.layout == "apart" else 1

    def outputs(self, channels_K: torch.Tensor) -> torch.Tensor:
        """Return which outputs make these channels, in an order in which they can be kept, int64."""
        if self.layout == "interleaved":
            return (channels_K[:, None] * self.rows + torch.arange(self.rows, device=channels_K.device)).flatten()
        width = self.site.out_features // self.rows
        return (torch.arange(self.rows, device=channels_K.device)[:, None] * width + channels_K).flatten()


@dataclass(frozen=True)
class ChannelGroup:
    """Layers of one block that can lose channels together.

    Attributes:
        consumer: the layer whose inputs the channels are, one each.
        producers: the layers whose outputs make them.
    """

    consumer: Site
    producers: tuple[Producer, ...]

    @property
    def name(self) -> str:
        """That of the consumer."""
        return self.consumer.name

    @property
    def channels(self) -> int:
        """How many there are."""
        return self.consumer.in_features

    @property
    def sites(self) -> tuple[Site, ...]:
        """The consumer and the producers."""
        return self.consumer, *(one.site for one in self.producers)

    @property
    def parameters_each(self) -> int:
        """Weights that a channel has."""
        return self.consumer.out_features + sum(one.rows * one.site.in_features for one in self.producers)


@dataclass(frozen=True)
class Found:
    """What was found of the channels of a model.

    Attributes:
        groups: in the model's order.
        reasons: for every other site that was looked at, why it is no consumer.
    """

    groups: tuple[ChannelGroup, ...]
    reasons: dict[str, str]


class _RefusedError(Exception):
    """A site that is no consumer of channels; says why."""


@torch.no_grad()
def find_channels(blocks: Sequence[nn.Module], anatomy: Anatomy, calls: Sequence[BlockCall]) -> Found:
    """Find the channel groups of a model, each proved in its own block.

    A consumer's inputs are its own (no other layer reads that tensor), and the layers that make them are those that ran
    right before it on one tensor. What is proved:

    - Input j changes if, and only if, the outputs of channel j do: for every bit of j once those of all channels with
      the bit set are changed, once those of all others.
    - With the consumer's inputs held, the block's output is the same bit for bit whatever the producers output.
    - The block runs with every other channel taken out, and gives what it gives where the consumer ignores them.

    Args:
        blocks: of the model, in evaluation mode; they are as before afterwards.
        anatomy: after the probe pass.
        calls: how blocks were called in it.
    """
    groups: list[ChannelGroup] = []
    reasons: dict[str, str] = {}
    first = {call.block: call for call in reversed(calls)}
    for index, block in enumerate(blocks):
        sites = anatomy.sites_of(index)
        if index not in first:
            reasons |= {site.name: "its block was not called" for site in sites}
            continue
        state = KeptState([block])
        prove = _Prover(block, anatomy, first[index], [layer for layer in anatomy.layers if layer.block == index])
        for site in sites:
            try:
                groups.append(prove.group(site, {one.name for one in sites}))
            except _RefusedError as why:
                reasons[site.name] = str(why)
        state.restore()
    return Found(tuple(groups), reasons)


class _Prover:
    """Finds and proves the channel groups of one block."""

    def __init__(self, block: nn.Module, anatomy: Anatomy, call: BlockCall, layers: Sequence[Site]) -> None:
        self._block, self._call = block, call
        self._modules = {layer.name: block.get_submodule(anatomy.path_in_block(layer)) for layer in layers}
        self._layers = {layer.name: layer for layer in layers}
        self._ran: list[str] = []
        self._generator = torch.Generator().manual_seed(0)

        self._outputs: Outputs = {}  # of each layer where it first ran

        with hooks(self._watched()):
            self._run()

    def _watched(self) -> Iterator[Any]:
        def enter(name: str) -> Callable[..., None]:
            return lambda *_: self._ran.append(name)

        def leave(name: str) -> Callable[..., None]:
            def note(_: nn.Module, __: Any, output: torch.Tensor) -> None:
                self._outputs.setdefault(name, output)

            return note

        for name, module in self._modules.items():
            yield module.register_forward_pre_hook(enter(name))
            yield module.register_forward_hook(leave(name))

    def _run(self) -> torch.Tensor:
        return self._call.run(self._block, self._call.hidden.clone())

    def group(self, consumer: Site, sites: set[str]) -> ChannelGroup:
        """Return the group of which a site is the consumer.

        Args:
            consumer: the site.
            sites: names of all that may be changed.

        Raises:
            _RefusedError: it is none.
        """
        candidates = self._candidates(consumer)
        base = {one.name: self._numbers(one) for one in candidates}
        before = self._input(consumer, base)
        moved = [one for one in candidates if not torch.equal(before, self._input(consumer, self._changed(base, one)))]
        if not moved:
            raise _RefusedError("what it reads does not depend on the layers that run before it")
        for one in moved:
            if one.name not in sites:
                raise _RefusedError(f"what it reads is made by {one.name}, which is not a target")
            if one.out_features % consumer.in_features:
                raise _RefusedError(
                    f"its {consumer.in_features} inputs are not made one by one by the {one.out_features} outputs of "
                    f"{one.name}"
                )
        producers = self._laid_out(consumer, moved)
        self._require_read_once(consumer, producers)
        self._require_removable(consumer, producers)
        return ChannelGroup(consumer, producers)

    def _candidates(self, consumer: Site) -> list[Site]:
        """Return the layers that ran right before a site, on one tensor."""
        if self._ran.count(consumer.name) != 1:
            raise _RefusedError("it does not run once in its block on the tokens of the probe pass")
        others = [one.name for one in self._layers.values() if one.reads == consumer.reads and one != consumer]
        if others:
            raise _RefusedError(f"{others[0]} reads its inputs too")
        before = self._ran[: self._ran.index(consumer.name)]
        if not before:
            raise _RefusedError("no layer of its block runs before it")
        reads = self._layers[before[-1]].reads
        found = [self._layers[name] for name in dict.fromkeys(before) if self._layers[name].reads == reads]
        if repeated := [one.name for one in found if self._ran.count(one.name) > 1]:
            raise _RefusedError(f"{repeated[0]}, which runs before it, runs more than once")
        return found

    def _numbers(self, site: Site, signed: bool = False) -> torch.Tensor:
        """Return what a layer is made to output, ``(rows, out)``: where activations rise, and are not cut off."""
        output = self._outputs[site.name]
        drawn = torch.rand(output.shape, generator=self._generator) * 0.3 + 0.1
        if signed:
            drawn *= torch.where(torch.rand(output.shape, generator=self._generator) < 0.5, -1.0, 1.0)
        return drawn.to(output)

    def _changed(self, base: Outputs, site: Site, mask: torch.Tensor | bool = True) -> Outputs:
        """Return outputs of which those of one layer are others, where a mask says so."""
        return {**base, site.name: torch.where(torch.as_tensor(mask), base[site.name] + 0.4, base[site.name])}

    def _input(self, consumer: Site, outputs: Outputs) -> torch.Tensor:
        """Return what a layer reads, ``(rows, in)``, where others output this."""
        seen: list[torch.Tensor] = []
        with (
            hooks(self._replaced(outputs)),
            hooks([self._modules[consumer.name].register_forward_pre_hook(lambda *args: seen.append(args[1][0]))]),
        ):
            self._run()
        return seen[0].reshape(-1, consumer.in_features)

    def _replaced(self, outputs: Outputs) -> Iterator[Any]:
        for name, output in outputs.items():
            yield self._modules[name].register_forward_hook(lambda *_, output=output: output.clone())

    def _laid_out(self, consumer: Site, moved: Sequence[Site]) -> tuple[Producer, ...]:
        """Return producers in a layout in which every input follows its own channel alone.

        Raises:
            _RefusedError: there is none.
        """
        rows = [one.out_features // consumer.in_features for one in moved]
        layouts: tuple[Layout, ...] = ("apart", "interleaved") if max(rows) > 1 else ("apart",)
        for layout in layouts:
            producers = tuple(Producer(one, count, layout) for one, count in zip(moved, rows, strict=True))
            if self._follows(consumer, producers, signed=False) and self._follows(consumer, producers, signed=True):
                return producers
        names = " and ".join(one.name for one in moved)
        raise _RefusedError(f"its inputs do not each depend on one channel of {names} alone")

    def _follows(self, consumer: Site, producers: Sequence[Producer], signed: bool) -> bool:
        """Whether input j changes where the outputs of channel j do (unless they are negative), and nowhere else."""
        width = consumer.in_features
        base = {one.site.name: self._numbers(one.site, signed) for one in producers}
        before = self._input(consumer, base)
        channels_N = torch.arange(width)
        bits = [(channels_N >> bit & 1).bool() for bit in range(max(1, math.ceil(math.log2(width))))]
        patterns = torch.stack([pattern for bit in bits for pattern in (bit, ~bit)])
        count = len(before)  # as many patterns at once as there are tokens
        for start in range(0, len(patterns), count):
            expected = torch.zeros(count, width, dtype=torch.bool)
            some = patterns[start : start + count]
            expected[: len(some)] = some
            outputs = base
            for one in producers:
                mask = torch.zeros(count, one.site.out_features, dtype=torch.bool)
                mask[:, one.outputs(channels_N)] = expected.repeat(1, one.rows) if one.parts > 1 else (
                    expected.repeat_interleave(one.rows, dim=1)
                )  # fmt: skip
                shape = base[one.site.name].shape
                outputs = self._changed(outputs, one.site, mask.view(shape).to(before.device))
            changed = (self._input(consumer, outputs) != before).cpu()
            if bool((changed & ~expected).any()) or (not signed and bool((expected & ~changed).any())):
                return False
        return True

    def _require_read_once(self, consumer: Site, producers: Sequence[Producer]) -> None:
        """Refuse where anything but the consumer reads what the producers output."""
        base = {one.site.name: self._numbers(one.site) for one in producers}
        held = self._input(consumer, base)
        other = base
        for one in producers:
            other = self._changed(other, one.site)

        def output(outputs: Outputs) -> torch.Tensor:
            def hold(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
                return (held.view_as(args[0]).clone(),)

            reads = [self._modules[consumer.name].register_forward_pre_hook(hold)]
            with hooks(reads), hooks(self._replaced(outputs)):
                return self._run()

        if not torch.equal(output(base), output(other)):
            names = " and ".join(one.site.name for one in producers)
            raise _RefusedError(f"something besides it reads what {names} output")

    def _require_removable(self, consumer: Site, producers: Sequence[Producer]) -> None:
        """Refuse where the block does not run, or computes something else, with half of the channels.

        Raises:
            _RefusedError: says what happens.
        """
        kept_K = torch.arange(0, consumer.in_features, 2)
        module = self._modules[consumer.name]
        mask_N = torch.zeros(consumer.in_features, dtype=torch.bool)
        mask_N[kept_K] = True

        def ignore(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            return (args[0].masked_fill(~mask_N.to(args[0].device), 0),)

        with hooks([module.register_forward_pre_hook(ignore)]):
            expected = self._run()
        with ExitStack() as stack:
            for one in producers:
                rows = one.outputs(kept_K)
                stack.enter_context(_reading(self._modules[one.site.name], rows=rows))
            stack.enter_context(_reading(module, columns=kept_K))
            try:
                found = self._run()
            except Exception as error:  # whatever a size that is not the configuration's leads to
                text = " ".join(str(error).split())[:120]
                raise _RefusedError(
                    f"its block does not run with fewer channels ({type(error).__name__}: {text})"
                ) from None
        scale = float(expected.double().norm()) or 1.0
        if found.shape != expected.shape or not (
            float((found.double() - expected.double()).norm()) <= TOLERANCE[expected.dtype] * scale
        ):
            raise _RefusedError("its block computes something else with fewer channels")


def _reading(
    module: nn.Module, rows: torch.Tensor | None = None, columns: torch.Tensor | None = None
) -> AbstractContextManager[None]:
    """Have a linear layer compute with some of its rows or columns for the length of a ``with`` block."""

    def forward(x: torch.Tensor) -> torch.Tensor:
        weight, bias = weight_of(module), bias_of(module)  # of a block that is read when it is called
        if rows is not None:
            weight, bias = weight[rows.to(weight.device)], None if bias is None else bias[rows.to(weight.device)]
        if columns is not None:
            weight = weight[:, columns.to(weight.device)]
        return functional.linear(x, weight, bias)

    return replaced_forwards([module], lambda _: forward)
