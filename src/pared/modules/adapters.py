"""LoRA on a compressed layer by the layer's usual name: ``LoraConfig(target_modules=["q_proj", "v_proj"])``.

PEFT adapts classes that it knows, and others that a ``LoraConfig`` registers. Every ``LoraConfig`` knows ours, from
the moment PEFT is imported; no call is needed.

An adapter of rank r beside factors of rank k is merged exactly, into factors of rank k + r: its ``A`` below ``down``,
its scaled ``B`` beside ``up``. What the layer was is kept until then, so unmerging gives it back bit for bit, unless
the model was cast meanwhile.

An adapter beside a pruned layer is merged where weights are stored; zeros stay zero.
"""

import functools
import importlib
import warnings
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import nn

from pared.importing import when_imported
from pared.modules.low_rank import LowRankLinear
from pared.modules.pivoted import PivotedLinear
from pared.modules.shared import BasisHolder
from pared.modules.sparse import SparseLinear

# Starting values of an adapter that leave the weight it stands on as it is; others (PiSSA, OLoRA, ...) change it.
HARMLESS_STARTS = ("gaussian", "eva", "orthogonal")
TOLD = "_custom_modules"  # what PEFT reads of a configuration


def teach_peft() -> None:
    """Let every ``LoraConfig`` know compressed layers from here on; PEFT need not be imported yet."""
    when_imported("peft.tuners.lora.config", _register)


def _register(module: ModuleType) -> None:
    """Have every ``LoraConfig`` report our layers as registered, without holding them.

    So a configuration can be pickled, and read where this package is not, and one that was read knows them too.
    """
    config: Any = module.LoraConfig
    if not hasattr(config, "_register_custom_module"):
        return
    above = config.__dict__.get(TOLD)  # of a folder's own copy of this file

    def registered(self: Any) -> dict[type, type]:
        known = above.fget(self) if above is not None else self.__dict__.get(TOLD) or {}
        ours: dict[type, type] = {BasisHolder: adapter_class(), SparseLinear: sparse_adapter_class()}
        return known if BasisHolder in known else {**known, **ours}

    def register(self: Any, known: dict[type, type] | None) -> None:
        self.__dict__[TOLD] = known

    def tell_more(self: Any, mapping: dict[type, type]) -> None:
        self.__dict__[TOLD] = {**(self.__dict__.get(TOLD) or {}), **mapping}

    setattr(config, TOLD, property(registered, register))
    config._register_custom_module = functools.wraps(config._register_custom_module)(tell_more)


@torch.no_grad()
def with_adapter(
    layer: LowRankLinear | PivotedLinear, A_RN: torch.Tensor, B_OR: torch.Tensor, bias_O: torch.Tensor | None
) -> LowRankLinear:
    """Return factors of their own for what a factorised layer computes, plus ``B A``; the layer stays as it is.

    Args:
        layer: a ``LowRankLinear`` or ``PivotedLinear`` of rank k.
        A_RN: ``(r, in)``.
        B_OR: ``(out, r)``, with its scale.
        bias_O: added to the bias; None where nothing is.

    Returns:
        A layer of rank k + r, or of the rank of its narrower side where that is less.
    """
    (down_KN, up_OK), bias = _factors(layer), layer.up.bias
    down, up = torch.cat((down_KN, A_RN.to(down_KN))), torch.cat((up_OK, B_OR.to(up_OK)), 1)
    if len(down) > min(down.shape[1], len(up)):  # no longer low: the whole weight beside an identity is smaller
        whole_ON = (up.double() @ down.double()).to(up)
        wide = down.shape[1] <= len(up)
        identity = torch.eye(min(whole_ON.shape), dtype=up.dtype, device=up.device)
        down, up = (identity, whole_ON) if wide else (whole_ON, identity)
    kind: Any = {"device": up.device, "dtype": up.dtype}
    new = LowRankLinear(down.shape[1], len(up), len(down), bias is not None, narrow=layer.narrow, **kind)
    new.down.weight.copy_(down)
    new.up.weight.copy_(up)
    if new.up.bias is not None:
        new.up.bias.copy_(bias if bias_O is None else bias + bias_O.to(bias))
    return new.train(layer.training).requires_grad_(layer.up.weight.requires_grad)


def _factors(layer: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ``down (k, in)`` and ``up (out, k)`` of a layer of either kind."""
    if isinstance(layer, LowRankLinear):
        return layer.down.weight, layer.up.weight
    up_OK = layer.up.weight
    identity = torch.eye(layer.rank, dtype=up_OK.dtype, device=up_OK.device)
    ordered = identity if layer.down is None else torch.cat((identity, layer.down.weight), 1)
    return ordered.index_select(1, layer.order.argsort()), up_OK


_Above: Any = object  # PEFT's own layer stands there in the end


class FactorisedLoraMixin(_Above):
    """An adapter beside a factorised layer: computes as on any linear layer, and merges into the factors."""

    base_layer: Any

    def __init__(self, base_layer: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        super().__init__(base_layer, adapter_name, *args, **kwargs)
        self.fan_in_fan_out = False  # whatever the rest of the model has: the factors are (out, in)
        self._before: list[LowRankLinear | PivotedLinear] = []

    def _get_in_out_features(self, module: nn.Module) -> tuple[int, int]:
        return int(module.in_features), int(module.out_features)  # type: ignore[arg-type]

    def __getattr__(self, name: str) -> Any:
        """Find the factors of the layer inside: a pattern may name them too, see ``__setattr__``."""
        base = super().__getattr__("base_layer") if name in ("up", "down") else None
        return super().__getattr__(name) if base is None else getattr(base, name)

    def __setattr__(self, name: str, value: Any) -> None:
        """Set as torch does, but for adapters on the factors where the whole layer has one: it is enough."""
        if name not in ("up", "down"):
            super().__setattr__(name, value)

    def update_layer(self, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Add an adapter.

        Raises:
            ValueError: it is of a kind that does more than add ``B A``, or starts by changing the weight.
        """
        start = getattr(kwargs.get("config"), "init_lora_weights", kwargs.get("init_lora_weights", True))
        if isinstance(start, str) and start not in HARMLESS_STARTS:
            _refuse(f"init_lora_weights={start!r}, which changes the weight it starts from")
        super().update_layer(adapter_name, *args, **kwargs)
        if self.use_dora.get(adapter_name) or adapter_name in getattr(self, "lora_variant", ()):
            variant = type(self.lora_variant[adapter_name]).__name__ if hasattr(self, "lora_variant") else "DoRA"
            _refuse(f"{variant}, which is more than two matrices added")

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Merge adapters: the layer gets factors of its own, of a higher rank; a shared basis stays as it was.

        Raises:
            ValueError: ``safe_merge`` is asked for, and a number is not finite.
            RuntimeError: an adapter has a bias and the layer none.
        """
        utils = importlib.import_module("peft.tuners.tuners_utils")
        for name in utils.check_adapters_to_merge(self, adapter_names):
            if name in self.lora_A:
                old = self.get_base_layer()
                new = with_adapter(old, *self._delta(name, old))
                if safe_merge and not all(bool(part.isfinite().all()) for part in new.parameters()):
                    raise ValueError(f"adapter {name}: merged factors are not finite; it seems to be broken")
                if old.shares is not None:
                    warnings.warn(
                        f"an adapter is merged into a layer whose basis {old.shares} others have too: it gets "
                        "factors of its own, and the others keep the basis",
                        stacklevel=2,
                    )
                self._before.append(old)
                self.base_layer = new
                self.merged_adapters.append(name)

    def unmerge(self) -> None:
        """Give the layer back as it was before anything was merged."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        now = self.base_layer.up.weight  # the model may have been moved or cast, which does not reach what is kept
        self.base_layer = self._before[0].to(now.device, now.dtype).requires_grad_(now.requires_grad)
        self._before.clear()
        self.merged_adapters.clear()

    def _delta(self, name: str, base: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        bias = self.lora_B[name].bias
        if bias is not None and base.up.bias is None:
            raise RuntimeError("lora_bias=True cannot be merged into a layer that has no bias")
        scaling = self.scaling[name]
        return (
            self.lora_A[name].weight,
            self.lora_B[name].weight * scaling,
            None if bias is None else bias * scaling,
        )


class SparseLoraMixin(_Above):
    """An adapter beside a pruned layer: computes as on any linear layer, and merges under the mask."""

    base_layer: Any

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Merge as PEFT does, but for pruned weights: what adapters add there is lost, and a warning says so."""
        before = len(self.merged_adapters)
        super().merge(safe_merge, adapter_names)
        if len(self.merged_adapters) > before:
            self.get_base_layer().keep_zeros_()
            warnings.warn(
                "an adapter is merged into a pruned layer: what it adds where weights are zero is lost, and the merged "
                "model does not answer as the adapted one; measure it again, or keep the adapter unmerged",
                stacklevel=2,
            )

    def unmerge(self) -> None:
        """Unmerge as PEFT does; zeros are zero again, without a rest of rounding."""
        super().unmerge()
        self.get_base_layer().keep_zeros_()


@functools.cache
def adapter_class() -> type:
    """Return PEFT's layer for factors, made when it is first asked for, as PEFT need not be there."""
    above = importlib.import_module("peft.tuners.lora.layer").Linear
    return type("FactorisedLora", (FactorisedLoraMixin, above), {"__module__": __name__})


@functools.cache
def sparse_adapter_class() -> type:
    """Return PEFT's layer for pruned layers, as :func:`adapter_class`."""
    above = importlib.import_module("peft.tuners.lora.layer").Linear
    return type("SparseLora", (SparseLoraMixin, above), {"__module__": __name__})


# by the names that a pickled model has for them
CLASSES: dict[str, Callable[[], type]] = {"FactorisedLora": adapter_class, "SparseLora": sparse_adapter_class}


def __getattr__(name: str) -> Any:
    """Return PEFT's layer for one of ours by its name, as a process that unpickles a model asks for it."""
    if name in CLASSES:
        return CLASSES[name]()
    raise AttributeError(f"module {__name__} has no attribute {name}")


def _refuse(what: str) -> None:
    raise ValueError(
        f"an adapter on a factorised layer cannot have {what}; use plain LoRA there, or put it on the factor that is a "
        'layer itself: target_modules=["up"]'
    )
