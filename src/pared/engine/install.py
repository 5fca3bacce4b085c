"""What stands in the place of layers, for good or for a while: where mathematics and modules meet."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn

from pared.lowrank import Factors
from pared.lowrank.pivot import Pivoted, pivot, unpivot
from pared.modules import LowRankLinear, PivotedLinear, inherit_requires_grad, replace_module, share
from pared.modules.narrow import narrowed, set_counts
from pared.modules.shared import DOWN
from pared.structure import bias_of, weight_of
from pared.structure.groups import ChannelGroup
from pared.structure.mixture import Mixture


class Narrowed(NamedTuple):
    """What is left of the layers of a channel group.

    Attributes:
        kept_K: the channels that stay.
        read: the weight that reads them, or its factors.
        shift_O: what is added to the bias of the layer that does; None for nothing.
        ranked: factors of what is left of layers that make them, by name; the others, or all, keep their rows.
    """

    kept_K: torch.Tensor
    read: torch.Tensor | Factors
    shift_O: torch.Tensor | None = None
    ranked: Mapping[str, Factors] | None = None

    def to(self, device: torch.device) -> "Narrowed":
        """Return the same on a device."""
        ranked = {name: _moved(one, device) for name, one in (self.ranked or {}).items()}
        return Narrowed(self.kept_K.to(device), _moved(self.read, device), _moved(self.shift_O, device), ranked)


def _moved(one: Any, device: torch.device) -> Any:
    if isinstance(one, Factors):
        return Factors(*(part.to(device) for part in one))
    return None if one is None else one.to(device)


def install(model: nn.Module, name: str, factors: Factors, pivoted: bool = False) -> None:
    """Put factors where one linear layer stands, as :func:`install_group`."""
    install_group(model, [name], factors, pivoted)


def install_group(model: nn.Module, names: Sequence[str], factors: Factors, pivoted: bool = False) -> None:
    """Put these factors where layers stand, dense or low-rank.

    Args:
        model: the whole model.
        names: of the layers; more than one share ``down``, one parameter, and have their rows of ``up`` each.
        factors: what takes their place, ``up`` stacked.
        pivoted: as a ``PivotedLinear``, ``rank²`` parameters fewer, rather than a ``LowRankLinear``.
    """
    put(model, names, made(model, names, factors, pivoted))


@torch.no_grad()
def made(
    model: nn.Module, names: Sequence[str], factors: Factors, pivoted: bool = False
) -> list[LowRankLinear | PivotedLinear]:
    """Return what :func:`install_group` puts in the place of layers; the model is as it was.

    Biases, dtype, device and ``requires_grad`` are those of the layers; a shared ``down`` is trained only if every one
    of them was.
    """
    olds = [model.get_submodule(name) for name in names]
    stored = pivot(factors) if pivoted else None
    up_OK = factors.up if stored is None else stored.W_OK
    news: list[LowRankLinear | PivotedLinear] = []
    for old, rows_OK in zip(olds, torch.split(up_OK, [_rows(old) for old in olds]), strict=True):
        own = Factors(factors.down, rows_OK) if stored is None else stored._replace(W_OK=rows_OK)
        new = _factored(old, own, _bias(old), getattr(old, "narrow", False))
        inherit_requires_grad(new, old)
        news.append(new)
    for new in news[1:]:
        if new.down is not None:
            share(new, news[0], names[0] + DOWN)
            new.down.weight.requires_grad_(all(one.up.weight.requires_grad for one in news))
    return news


@torch.no_grad()
def narrow(model: nn.Module, group: ChannelGroup, left: Narrowed, pivoted: bool = False) -> list[tuple[str, nn.Module]]:
    """Return what takes the places of a group's layers where only some of its channels stay; the model is as it was.

    Biases, dtype, device and ``requires_grad`` are those of the layers.

    Args:
        model: the whole model.
        group: whose channels these are.
        left: of its layers.
        pivoted: whether factors are stored by their pivots.
    """
    new: nn.Module
    found: list[tuple[str, nn.Module]] = []
    for site in group.sites:
        old = model.get_submodule(site.name)
        bias = _bias(old)
        if site == group.consumer:
            bias = _shifted(bias, left.shift_O)
            if isinstance(left.read, Factors):
                new = _factored(old, pivot(left.read) if pivoted else left.read, bias, narrow=True)
            else:
                new = narrowed(old, left.read, bias)
        else:
            (producer,) = (one for one in group.producers if one.site == site)
            rows_K = producer.outputs(left.kept_K)
            bias = None if bias is None else bias[rows_K]
            if (own := (left.ranked or {}).get(site.name)) is not None:
                new = _factored(old, pivot(own) if pivoted else own, bias, narrow=True)
            else:
                new = _with_outputs(old, rows_K, bias, producer.parts)
        inherit_requires_grad(new, old)
        found.append((site.name, new))
    return found


def _factored(
    old: nn.Module, factors: Factors | Pivoted, bias_O: torch.Tensor | None, narrow: bool
) -> LowRankLinear | PivotedLinear:
    """Return a layer of these factors, as they are to be stored, of the dtype and device of an old one."""
    new: LowRankLinear | PivotedLinear
    if isinstance(factors, Pivoted):
        rank, others = factors.C_KR.shape
        new = PivotedLinear(rank + others, len(factors.W_OK), rank, bias_O is not None, narrow=narrow, **_floating(old))
        new.set_weight(factors.pivots_K, factors.W_OK, factors.C_KR)
    else:
        rank, inputs = factors.down.shape
        new = LowRankLinear(inputs, len(factors.up), rank, bias_O is not None, narrow=narrow, **_floating(old))
        new.down.weight.copy_(factors.down)
        new.up.weight.copy_(factors.up)
    if bias_O is not None and new.bias is not None:
        new.bias.copy_(bias_O)
    return new


def _with_outputs(old: nn.Module, rows_K: torch.Tensor, bias_K: torch.Tensor | None, parts: int) -> nn.Module:
    """Return a layer with some of the outputs of one, dense or with a rank."""
    if not isinstance(old, (LowRankLinear, PivotedLinear)):
        return narrowed(old, weight_of(old)[rows_K], bias_K, parts)
    new = type(old)(old.in_features, len(rows_K), old.rank, bias_K is not None, narrow=True, **_floating(old))
    new.up.weight.copy_(old.up.weight[rows_K])
    if bias_K is not None and new.bias is not None:
        new.bias.copy_(bias_K)
    if old.down is not None and new.down is not None:
        new.down.weight.copy_(old.down.weight)
    if isinstance(old, PivotedLinear) and isinstance(new, PivotedLinear):
        new.order.copy_(old.order)
    return new


def _shifted(bias_O: torch.Tensor | None, shift_O: torch.Tensor | None) -> torch.Tensor | None:
    return bias_O if shift_O is None else shift_O if bias_O is None else bias_O + shift_O


def count(model: nn.Module, group: ChannelGroup, width: int) -> None:
    """Have the modules that count a group's channels count so many."""
    for one in group.counts:
        set_counts(model.get_submodule(one.module), {one.attribute: one.each * width})


@torch.no_grad()
def keep_experts(model: nn.Module, mixture: Mixture, kept_K: torch.Tensor) -> None:
    """Leave some experts of a mixture alone, in place; numbers that count them are as before.

    Args:
        model: the whole model; it gets new tensors, and those it had stay as they are.
        mixture: of it.
        kept_K: numbers of the experts that stay, rising.
    """
    for stack in mixture.stacks:
        module = model.get_submodule(stack.module)
        space: Any = module._parameters if stack.parameter else module._buffers
        old = space[stack.leaf]
        some = old.detach()[kept_K.to(old.device)]
        space[stack.leaf] = nn.Parameter(some, old.requires_grad) if stack.parameter else some


def put(model: nn.Module, names: Sequence[str], news: Sequence[nn.Module]) -> None:
    """Put modules where layers stand, in their mode and with their hooks."""
    for name, new in zip(names, news, strict=True):
        replace_module(model, name, new)


@contextmanager
def unchanged(model: nn.Module, names: Iterable[str]) -> Iterator[None]:
    """Let layers be replaced for the length of a ``with`` block; afterwards the ones that stood there stand again."""
    before = {name: model.get_submodule(name) for name in names}
    try:
        yield
    finally:
        for name, module in before.items():
            replace_module(model, name, module)


@contextmanager
@torch.no_grad()
def patched(model: nn.Module, weights: Iterable[tuple[str, torch.Tensor]]) -> Iterator[None]:
    """Have other weights in layers for the length of a ``with`` block, the same bits as before afterwards.

    Args:
        model: whose layers these are; its modules stay where they are.
        weights: of layers by name, each ``(out, in)`` and made when its turn comes; memory: a copy of the weights that
            were there.
    """
    before: dict[str, torch.Tensor] = {}
    try:
        for name, W_ON in weights:
            weight = weight_of(model.get_submodule(name))
            before[name] = weight.detach().clone()
            weight.copy_(W_ON)
        yield
    finally:
        for name, dense in before.items():
            weight_of(model.get_submodule(name)).copy_(dense)


def dense_linear(old: nn.Module, W_ON: torch.Tensor) -> nn.Linear:
    """Return a linear layer of this weight ``(out, in)`` with the bias, dtype and device of a layer."""
    bias = _bias(old)
    new = nn.Linear(W_ON.shape[1], W_ON.shape[0], bias is not None, **_floating(old))
    with torch.no_grad():
        new.weight.copy_(W_ON)
        if bias is not None:
            new.bias.copy_(bias)
    inherit_requires_grad(new, old)
    return new


def factors_of(modules: Sequence[LowRankLinear | PivotedLinear]) -> Factors:
    """Return the factors that modules with one basis stand for: ``down (rank, in)``, ``up (Σ out, rank)``."""
    first = modules[0]
    up_OK = torch.cat([module.up.weight for module in modules]).detach()
    if isinstance(first, LowRankLinear):
        return Factors(first.down.weight.detach(), up_OK)
    others = first.in_features - first.rank
    C_KR = up_OK.new_empty(first.rank, others) if first.down is None else first.down.weight.detach()
    return unpivot(first.pivots, up_OK, C_KR)


def _rows(layer: nn.Module) -> int:
    return layer.out_features if isinstance(layer, (LowRankLinear, PivotedLinear)) else len(weight_of(layer))


def _bias(layer: nn.Module) -> torch.Tensor | None:
    return layer.bias if isinstance(layer, (LowRankLinear, PivotedLinear)) else bias_of(layer)


def _floating(layer: nn.Module) -> dict[str, Any]:
    """Return the device and dtype of a layer's numbers."""
    weight = layer.up.weight if isinstance(layer, (LowRankLinear, PivotedLinear)) else weight_of(layer)
    return {"device": weight.device, "dtype": weight.dtype}
