"""Linear layers that lost channels: as the architecture has them, with fewer inputs or outputs.

Some attentions count their heads by numbers of their own (OPT's ``num_heads``, GPT-2's ``split_size``), others by the
shapes of what their layers output. The numbers of the former are set, and written in the map.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D


class NarrowLinear(nn.Linear):
    """A linear layer with fewer inputs or outputs than the architecture's configuration says.

    Args:
        in_features: width of the input.
        out_features: width of the output.
        bias: whether there is a bias.
        parts: of how many equal parts the outputs consist, each of which lost as many: 2 of a fused gate and up.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool,
        parts: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, device=device, dtype=dtype)
        self.parts = parts

    def entry(self) -> dict[str, int | bool]:
        """Return what a checkpoint's map says of this module: the arguments that make it again."""
        return _entry(self.in_features, self.out_features, self)


class NarrowConv1D(Conv1D):
    """The same of GPT-2's layer, whose weight is ``(in, out)``; it always has a bias.

    Args:
        in_features: width of the input.
        out_features: width of the output.
        bias: must be true.
        parts: as of :class:`NarrowLinear`.

    Raises:
        ValueError: without a bias.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool,
        parts: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if not bias:
            raise ValueError("a layer of the kind of Conv1D has a bias")
        nn.Module.__init__(self)  # that of Conv1D takes neither a device nor a dtype
        self.nf, self.nx, self.parts = out_features, in_features, parts
        self.weight = nn.Parameter(torch.zeros(in_features, out_features, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype))

    def entry(self) -> dict[str, int | bool]:
        """Return what a checkpoint's map says of this module: the arguments that make it again."""
        return _entry(self.nx, self.nf, self)


COUNTS = "pared_counts"  # attribute of a module whose numbers are no longer the configuration's: these numbers, by name


def set_counts(module: nn.Module, counts: Mapping[str, int]) -> None:
    """Give a module other numbers of heads, in place, so that :func:`counts_of` tells.

    Args:
        module: an attention.
        counts: by the name of the attribute.
    """
    own = vars(module)
    own.update({**counts, COUNTS: {**own.get(COUNTS, {}), **counts}})


def counts_of(root: nn.Module, prefix: str = "") -> dict[str, dict[str, int]]:
    """Return the numbers of heads that were set, by the name of the module and the attribute; names with a prefix."""
    modules = root.named_modules(prefix=prefix)
    return {name: dict(vars(module)[COUNTS]) for name, module in modules if COUNTS in vars(module)}


def forget_counts(root: nn.Module) -> None:
    """Keep the numbers of heads, but no longer tell that they were set."""
    for module in root.modules():
        vars(module).pop(COUNTS, None)


Narrow = NarrowLinear | NarrowConv1D


def _entry(in_features: int, out_features: int, module: Any) -> dict[str, int | bool]:
    bias = module.bias is not None
    return {"in_features": in_features, "out_features": out_features, "bias": bias, "parts": module.parts}


@torch.no_grad()
def narrowed(old: nn.Module, W_ON: torch.Tensor, bias_O: torch.Tensor | None, parts: int = 1) -> Narrow:
    """Return a layer of another weight, of the kind, dtype and device of an old one.

    Args:
        old: a linear layer or a ``Conv1D``.
        W_ON: the weight ``(out, in)``.
        bias_O: the bias ``(out,)``, where there is one.
        parts: of how many equal parts the outputs consist.
    """
    weight: torch.Tensor = old.weight  # type: ignore[assignment]
    kind = NarrowConv1D if isinstance(old, Conv1D) else NarrowLinear
    new = kind(W_ON.shape[1], len(W_ON), bias_O is not None, parts, device=weight.device, dtype=weight.dtype)
    new.weight.copy_(W_ON.T if isinstance(new, NarrowConv1D) else W_ON)
    if bias_O is not None:
        new.bias.copy_(bias_O)
    return new


@torch.no_grad()
def widen_(old: nn.Module, W_ON: torch.Tensor, bias_O: torch.Tensor | None, parts: int = 1) -> None:
    """Make a layer of the architecture's size compute what a narrow one does, zeros for the channels that are gone.

    Args:
        old: of the architecture's size; all of its numbers are overwritten.
        W_ON: the weight of the narrow one ``(out, in)``. The channels that are left come first, in every part of the
            outputs.
        bias_O: the bias ``(out,)``, where there is one.
        parts: of how many equal parts the outputs consist.
    """
    weight: Any = old.weight
    whole_ON = weight.zero_().T if isinstance(old, Conv1D) else weight.zero_()
    narrow_PON = W_ON.reshape(parts, -1, W_ON.shape[1])
    whole_ON.view(parts, -1, whole_ON.shape[1])[:, : narrow_PON.shape[1], : narrow_PON.shape[2]].copy_(narrow_PON)
    if bias_O is not None:
        bias: Any = old.bias
        bias.zero_()
        bias.view(parts, -1)[:, : narrow_PON.shape[1]].copy_(bias_O.view(parts, -1))
