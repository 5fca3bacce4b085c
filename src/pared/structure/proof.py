"""Whether a layer computes ``x Wᵀ + b``: a class that derives from ``nn.Linear`` may do anything."""

import math
from contextlib import suppress
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from pared.errors import ParedError
from pared.structure.linear import bias_of, weight_of
from pared.structure.state import OF_TORCH, KeptState

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# What rounding can make of a product, relative to its norm. Half precision is compared with the product in float32:
# what is left is the rounding of the result, of about a unit in its last place.
TOLERANCE = {torch.float16: 1e-3, torch.bfloat16: 6e-3, torch.float32: 1e-5, torch.float64: 1e-10}
_NOT_LINEAR = "its output is not x Wᵀ + b"
_OUT, _IN, _ROWS = 3, 5, 4  # of the small stand-in
_MOST_WEIGHTS = 2**24  # of a stand-in of full size, where a small one does not run


def require_plain_weight(module: nn.Module, name: str) -> None:
    """Refuse a weight that is not a plain floating point tensor.

    Raises:
        ParedError: says what was found: a tensor subclass (torchao, quanto), integers or 8-bit floats (bitsandbytes).
    """
    weight = module.weight
    kind, dtype = type(weight), getattr(weight, "dtype", None)
    if kind not in (torch.Tensor, nn.Parameter):
        raise ParedError(
            f"site {name} holds a {kind.__module__}.{kind.__qualname__} (the model was quantised in memory, or wraps "
            "its weights otherwise); pared needs plain floating point weights: load the model without quantisation"
        )
    if dtype not in FLOATS:
        raise ParedError(
            f"site {name} holds {dtype}; pared needs floating point weights (float16, bfloat16, float32, float64): "
            "load the model without quantisation"
        )


def fault_of_class(module: nn.Module, known: dict[Any, str | None]) -> str | None:
    """Return why a layer is not ``x Wᵀ + b``, from its class and attributes alone; None if nothing speaks against it.

    The weight may be on the meta device. A ``forward`` of a class that is not torch's or transformers' own runs on a
    small stand-in with random numbers in all its tensors, so that plans from shapes and compressions agree; where that
    cannot be, as where it takes but one dtype or one device, a pass decides. Nothing that the layer holds changes.

    Args:
        module: an ``nn.Linear`` or ``Conv1D``, or of a class derived from them.
        known: answers so far, by class and attributes; one model has many layers of one class.
    """
    own = module._parameters
    if own.get("weight") is None or (getattr(module, "bias", None) is not None and own.get("bias") is None):
        return "its weight is computed from other tensors (weight_norm, spectral_norm, pruning, a parametrization)"
    if weight_of(module).ndim != 2:
        return f"its weight has {weight_of(module).ndim} dimensions, not 2"
    if "forward" in vars(module) or type(module).forward in (nn.Linear.forward, Conv1D.forward):
        return None  # what an instance's own forward does with it is seen in the probe pass
    attributes = {name: value for name, value in vars(module).items() if name not in OF_TORCH}
    plain = all(isinstance(value, (bool, int, float, str, type(None))) for value in attributes.values())
    held = tuple((name, tensor is not None) for name, tensor in own.items())
    inside = (*module._buffers, *module._modules)
    same = tuple(sorted(attributes.items())) if plain else id(module)
    key = (type(module), module.weight.dtype, held, inside, same)
    if key not in known:
        kept = KeptState([module])  # a stand-in holds the layer's own lists and other objects
        fault = _try(module)
        kept.restore()
        known[key] = f"{fault}{_further(module)}" if fault and fault.startswith(_NOT_LINEAR) else fault
    return known[key]


def fault_of_call(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> str | None:
    """Return why what a layer just output is not ``x Wᵀ + b``; None if it is, up to rounding."""
    if len(args) != 1 or kwargs or not isinstance(args[0], torch.Tensor):
        return "it is not called with its input alone"
    if not isinstance(output, torch.Tensor):
        return f"it outputs a {type(output).__name__}, not a tensor"
    x, bias = args[0].detach(), bias_of(module)
    weight = weight_of(module).detach()
    if x.ndim == 0 or x.shape[-1] != weight.shape[1] or x.dtype != weight.dtype:
        return f"it reads {tuple(x.shape)} in {x.dtype}, not (..., {weight.shape[1]}) in {weight.dtype}"
    if x.is_meta or weight.is_meta:
        return None
    expected = functional.linear(x, weight, bias)
    if output.shape == expected.shape and torch.equal(output, expected):
        return None
    if output.shape != expected.shape or output.dtype != expected.dtype:
        actual, wanted = (f"{tuple(tensor.shape)} in {tensor.dtype}" for tensor in (output, expected))
        return f"it outputs {actual}, not {wanted}"
    if not bool(expected.isfinite().all()):
        return None  # its input is not finite: whatever made that is to blame
    if x.dtype in (torch.float16, torch.bfloat16):
        x, weight, bias = x.float(), weight.float(), None if bias is None else bias.float()
        expected = functional.linear(x, weight, bias)
    # The bias may cancel the product, and the terms of the product one another: rounding goes by the larger numbers.
    size = float(functional.linear(x, weight).double().norm())
    size += 0.0 if bias is None else float(bias.detach().expand_as(expected).double().norm())
    size += 1e-3 * float(x.double().norm()) * float(weight.double().norm())
    difference = float((output.detach().double() - expected.double()).norm())
    if difference <= _tolerance(output) * size:
        return None
    relative = difference / size if size else math.inf
    return f"{_NOT_LINEAR} (difference {relative:.2g})"


def _tolerance(output: torch.Tensor) -> float:
    if output.is_cuda and output.dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32:
        return 2e-3
    return TOLERANCE.get(output.dtype, 1e-5)


def _further(module: nn.Module) -> str:
    """Return what to add to a reason where a class computes with more than weight and bias: their values may fit."""
    tensors = [name for name, _ in (*module.named_parameters(), *module.named_buffers())]
    further = [name for name in tensors if name not in ("weight", "bias")]
    return f" for every value of its further tensors ({', '.join(further[:3])})" if further else ""


def _try(module: nn.Module) -> str | None:
    """Run stand-ins of a layer until one is conclusive: a small one, or where only its own size fits, one of that.

    Its forward may take one dtype only, or one device, or read any attribute that goes with its true size.
    """
    weight = weight_of(module)
    small, whole = (_OUT, _IN), tuple(weight.shape)
    fault: str | None = None
    for shape, dtype in dict.fromkeys(((small, torch.float32), (small, weight.dtype), (whole, weight.dtype))):
        if shape == whole and weight.numel() > _MOST_WEIGHTS:
            continue
        with suppress(Exception):
            stand_in = _stand_in(module, shape, dtype)
            x = torch.randn(1, _ROWS, shape[1], generator=torch.Generator().manual_seed(1)).to(dtype)
            fault = fault_of_call(stand_in, (x,), {}, _call(stand_in, x))
            if fault is None or fault.startswith(_NOT_LINEAR):
                return fault
    return fault


@torch.no_grad()
def _call(module: nn.Module, x: torch.Tensor) -> Any:
    return type(module).forward(module, x)


def _stand_in(module: nn.Module, shape: tuple[int, ...], dtype: torch.dtype) -> nn.Module:
    """Return a module of the same class and attributes, without hooks, with random weights of this ``(out, in)``."""
    generator = torch.Generator().manual_seed(0)

    def fresh(tensor: torch.Tensor | None, size: tuple[int, ...] | None = None) -> torch.Tensor | None:
        if tensor is None:
            return None
        size = tuple(tensor.shape) if size is None else size
        if not tensor.is_floating_point():
            return torch.zeros(size, dtype=tensor.dtype)
        return nn.Parameter(torch.randn(size, generator=generator).to(dtype), requires_grad=False)

    def like(old: nn.Module) -> nn.Module:
        new: nn.Module = old.__class__.__new__(old.__class__)
        nn.Module.__init__(new)
        empty = set(vars(new))
        vars(new).update({name: value for name, value in vars(old).items() if name not in empty})
        new._parameters.update({name: fresh(tensor) for name, tensor in old._parameters.items()})  # type: ignore[misc]
        new._buffers.update({name: fresh(tensor) for name, tensor in old._buffers.items()})
        new._modules.update({name: None if child is None else like(child) for name, child in old._modules.items()})
        return new.eval()

    new, (rows, columns) = like(module), shape
    stored = (columns, rows) if isinstance(module, Conv1D) else (rows, columns)
    new._parameters["weight"] = fresh(module._parameters["weight"], stored)  # type: ignore[assignment]
    if module._parameters.get("bias") is not None:
        new._parameters["bias"] = fresh(module._parameters["bias"], (rows,))  # type: ignore[assignment]
    names = ("nf", "nx") if isinstance(module, Conv1D) else ("out_features", "in_features")
    vars(new).update(zip(names, shape, strict=True))
    return new
