"""Experiments on one block: what reaches a layer where others output numbers of our choice."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from pared.structure.calls import BlockCall
from pared.structure.groups import ChannelGroup, Producer, RefusedError
from pared.structure.linear import bias_of, weight_of
from pared.structure.model import Anatomy, Site
from pared.structure.probe import hooks, replaced_forwards
from pared.structure.proof import TOLERANCE

Outputs = dict[str, torch.Tensor]  # what layers are made to output, by name


class Prover:
    """Runs one block again and again, as it was called in the probe pass."""

    def __init__(self, block: nn.Module, anatomy: Anatomy, call: BlockCall, layers: Sequence[Site]) -> None:
        self._block, self._call = block, call
        self._paths = {layer.name: anatomy.path_in_block(layer) for layer in layers}
        self._modules = {name: block.get_submodule(path) for name, path in self._paths.items()}
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

    def owners(self, sites: Sequence[Site]) -> dict[str, nn.Module]:
        """Return the modules that some layers lie in, by full name."""
        found: dict[str, nn.Module] = {}
        for site in sites:
            inside, _, _ = self._paths[site.name].rpartition(".")
            found[site.parent] = self._block.get_submodule(inside)
        return found

    def candidates(self, consumer: Site) -> list[Site]:
        """Return the layers that ran right before a site, on one tensor.

        Raises:
            RefusedError: there are none, or one of them runs several times.
        """
        if self._ran.count(consumer.name) != 1:
            raise RefusedError("it does not run once in its block on the tokens of the probe pass")
        others = [one.name for one in self._layers.values() if one.reads == consumer.reads and one != consumer]
        if others:
            raise RefusedError(f"{others[0]} reads its inputs too")
        before = self._ran[: self._ran.index(consumer.name)]
        if not before:
            raise RefusedError("no layer of its block runs before it")
        reads = self._layers[before[-1]].reads
        found = [self._layers[name] for name in dict.fromkeys(before) if self._layers[name].reads == reads]
        if repeated := [one.name for one in found if self._ran.count(one.name) > 1]:
            raise RefusedError(f"{repeated[0]}, which runs before it, runs more than once")
        return found

    def numbers(self, site: Site, signed: bool = False) -> torch.Tensor:
        """Return what a layer is made to output, ``(rows, out)``: where activations rise, and are not cut off."""
        output = self._outputs[site.name]
        drawn = torch.rand(output.shape, generator=self._generator) * 0.3 + 0.1
        if signed:
            drawn *= torch.where(torch.rand(output.shape, generator=self._generator) < 0.5, -1.0, 1.0)
        return drawn.to(output)

    def normal(self, site: Site) -> torch.Tensor:
        """Return what a layer is made to output, ``(rows, out)``: normal, so that rows attend to few others."""
        output = self._outputs[site.name]
        return torch.randn(output.shape, generator=self._generator).to(output)

    def input(self, consumer: Site, outputs: Outputs) -> torch.Tensor:
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

    def require_read_once(self, consumer: Site, producers: Sequence[Producer]) -> None:
        """Refuse where anything but the consumer reads what the producers output.

        Raises:
            RefusedError: something does.
        """
        base, other = ({one.site.name: self.numbers(one.site) for one in producers} for _ in range(2))
        held = self.input(consumer, base)

        def output(outputs: Outputs) -> torch.Tensor:
            def hold(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
                return (held.view_as(args[0]).clone(),)

            reads = [self._modules[consumer.name].register_forward_pre_hook(hold)]
            with hooks(reads), hooks(self._replaced(outputs)):
                return self._run()

        if not torch.equal(output(base), output(other)):
            names = " and ".join(one.site.name for one in producers)
            raise RefusedError(f"something besides it reads what {names} output")

    def require_removable(self, group: ChannelGroup, kept_K: torch.Tensor) -> None:
        """Refuse where the block does not run, or computes something else, with some channels alone.

        Args:
            group: the layers, and which attributes of their modules go with the number of channels.
            kept_K: the channels that stay.

        Raises:
            RefusedError: says what happens.
        """
        columns, mask_N = group.read(kept_K), torch.zeros(group.consumer.in_features, dtype=torch.bool)
        module = self._modules[group.name]
        mask_N[columns] = True

        def ignore(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            return (args[0].masked_fill(~mask_N.to(args[0].device), 0),)

        with hooks([module.register_forward_pre_hook(ignore)]):
            expected = self._run()
        with ExitStack() as stack:
            for one in group.producers:
                rows = one.outputs(kept_K)
                stack.enter_context(_reading(self._modules[one.site.name], rows=rows))
            stack.enter_context(_reading(module, columns=columns))
            owners = self.owners(group.sites)
            for count in group.counts:
                stack.enter_context(_counting(owners[count.module], count.attribute, count.each * len(kept_K)))
            try:
                found = self._run()
            except Exception as error:  # whatever a size that is not the configuration's leads to
                text = " ".join(str(error).split())[:120]
                raise RefusedError(
                    f"its block does not run with fewer {group.unit}s ({type(error).__name__}: {text})"
                ) from None
        scale = float(expected.double().norm()) or 1.0
        if found.shape != expected.shape or not (
            float((found.double() - expected.double()).norm()) <= TOLERANCE[expected.dtype] * scale
        ):
            raise RefusedError(f"its block computes something else with fewer {group.unit}s")


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


@contextmanager
def _counting(module: nn.Module, attribute: str, value: int) -> Iterator[None]:
    """Have another number in an attribute of a module for the length of a ``with`` block."""
    before = vars(module)[attribute]
    vars(module)[attribute] = value
    try:
        yield
    finally:
        vars(module)[attribute] = before


def every_bit(count: int) -> Iterator[torch.Tensor]:
    """Yield for every bit of the numbers below a count which have it, and which do not; bool ``(count,)`` each."""
    numbers_N = torch.arange(count)
    for bit in range(max(1, math.ceil(math.log2(count)))):
        pattern = (numbers_N >> bit & 1).bool()
        yield from (pattern, ~pattern)
