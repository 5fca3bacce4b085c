"""A linear layer whose weight is whole numbers of few bits and scales; it is dense only while it computes.

int8 has one scale for every output, int4 one for every ``group`` consecutive inputs of an output, the last of which may
be shorter. A weight is its whole number times its scale, in the dtype of the scales: -127 to 127 for int8, -8 to 7 for
int4, whose scales may be negative, so that the far end is there for either sign. Two int4 lie in a byte as 0 to 15, the
first input in the lower half; the last byte of an odd row is filled with zeros.

Legend of the shape suffixes: O outputs, N inputs, G groups of inputs, P packed bytes of an output.
"""

from typing import Any

import torch
from torch import nn
from torch.nn import functional

LEAST = {8: -127, 4: -8}  # whole numbers of so many bits
MOST = {8: 127, 4: 7}


def pack_int4(integers_ON: torch.Tensor) -> torch.Tensor:
    """Return whole numbers from -8 to 7, two to a byte, uint8 ``(out, ⌈in / 2⌉)``.

    Raises:
        ValueError: a number is out of range.
    """
    if integers_ON.numel() and not (int(integers_ON.min()) >= LEAST[4] and int(integers_ON.max()) <= MOST[4]):
        raise ValueError(f"int4 of {int(integers_ON.min())} to {int(integers_ON.max())}: expected -8 to 7")
    halves_ON = (integers_ON.to(torch.int16) - LEAST[4]).to(torch.uint8)
    if halves_ON.shape[1] % 2:
        halves_ON = functional.pad(halves_ON, (0, 1))
    return halves_ON[:, 0::2] | halves_ON[:, 1::2] << 4


def unpack_int4(bytes_OP: torch.Tensor, in_features: int) -> torch.Tensor:
    """Return the whole numbers ``(out, in)`` that :func:`pack_int4` has packed, int8."""
    halves_OP2 = torch.stack((bytes_OP & 15, bytes_OP >> 4), dim=-1)
    return halves_OP2.flatten(1)[:, :in_features].to(torch.int8) + LEAST[4]


def dequantized(integers_ON: torch.Tensor, scales_OG: torch.Tensor, group: int) -> torch.Tensor:
    """Return the weight ``(out, in)`` of whole numbers and scales, in the dtype of the scales.

    Args:
        integers_ON: int8 ``(out, in)``.
        scales_OG: one for every group of inputs of an output.
        group: inputs of a group; 0 for all of them.
    """
    group = group or max(integers_ON.shape[1], 1)
    numbers_ON = integers_ON.to(scales_OG.dtype)
    if numbers_ON.shape[1] % group == 0:
        return (numbers_ON.view(*scales_OG.shape, group) * scales_OG.unsqueeze(-1)).flatten(1)
    return numbers_ON * scales_OG.repeat_interleave(group, dim=1)[:, : numbers_ON.shape[1]]


class QuantizedLinear(nn.Module):
    """A linear layer stored in few bits.

    It is no ``nn.Linear``: what adds to a weight in place, as a merge of an adapter does, would add to a copy of it.
    ``weight`` is made anew whenever it is asked for. Scales are parameters, whole numbers are not.

    Args:
        in_features: width of the input.
        out_features: width of the output.
        bias: whether there is a bias.
        bits: of a whole number, 8 or 4.
        group: consecutive inputs with one scale; 0 for all of an output.
        narrow: whether it has fewer inputs or outputs than the architecture's configuration says.

    Attributes:
        codes: int8 ``(out, in)``, or of int4 uint8 ``(out, ⌈in / 2⌉)``.
        scales: ``(out, groups)``.
        bias: ``(out,)``, or None.
    """

    codes: torch.Tensor
    scales: nn.Parameter
    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool,
        bits: int,
        group: int = 0,
        narrow: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if bits not in LEAST:
            raise ValueError(f"{bits} bits a weight: expected 8 or 4")
        self.in_features, self.out_features, self.bits, self.group = in_features, out_features, bits, group
        self.narrow = narrow
        width, kind = (in_features, torch.int8) if bits == 8 else (-(-in_features // 2), torch.uint8)
        self.register_buffer("codes", torch.zeros(out_features, width, device=device, dtype=kind))
        groups = -(-in_features // group) if group else 1
        self.scales = nn.Parameter(torch.zeros(out_features, groups, device=device, dtype=dtype))
        self.register_parameter("bias", nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype)) if bias
                                else None)  # fmt: skip

    @classmethod
    @torch.no_grad()
    def of(
        cls,
        integers_ON: torch.Tensor,
        scales_OG: torch.Tensor,
        bias_O: torch.Tensor | None,
        bits: int,
        group: int = 0,
        narrow: bool = False,
    ) -> "QuantizedLinear":
        """Return a layer of these whole numbers ``(out, in)`` and scales, in the dtype of the scales.

        Raises:
            ValueError: a number is out of range, or there are not as many scales as groups.
        """
        out_features, in_features = integers_ON.shape
        kind: Any = {"device": scales_OG.device, "dtype": scales_OG.dtype}
        new = cls(in_features, out_features, bias_O is not None, bits, group, narrow, **kind)
        if scales_OG.shape != new.scales.shape:
            raise ValueError(f"scales {tuple(scales_OG.shape)} of a weight {tuple(integers_ON.shape)} in groups of "
                             f"{group or in_features}: expected {tuple(new.scales.shape)}")  # fmt: skip
        new.codes.copy_(integers_ON if bits == 8 else pack_int4(integers_ON))
        new.scales.copy_(scales_OG)
        if new.bias is not None and bias_O is not None:
            new.bias.copy_(bias_O)
        new.check()
        return new

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map ``(..., in)`` to ``(..., out)``."""
        return functional.linear(x, self.weight, self.bias)

    @property
    def integers(self) -> torch.Tensor:
        """The whole numbers, int8 ``(out, in)``."""
        return self.codes if self.bits == 8 else unpack_int4(self.codes, self.in_features)

    @property
    def weight(self) -> torch.Tensor:
        """The dense weight ``(out, in)``, recomputed: every whole number times the scale of its group."""
        return dequantized(self.integers, self.scales, self.group)

    def check(self) -> None:
        """Check what the layer holds; nothing is to be said of one without values.

        Raises:
            ValueError: a number that is none of these bits, bits behind the last weight of an output, or a scale that
                is not finite.
        """
        if self.codes.is_meta or not self.codes.numel():
            return
        if self.bits == 8 and int(self.codes.min()) < LEAST[8]:
            raise ValueError(f"a weight of int8 is {int(self.codes.min())}, expected -127 to 127; it is damaged")
        if self.bits == 4 and self.in_features % 2 and bool((self.codes[:, -1] >> 4).any()):
            raise ValueError(f"bits behind the {self.in_features} weights of an output are set; they are damaged")
        if not bool(self.scales.isfinite().all()):
            raise ValueError("a scale is not a finite number; it is damaged")

    def entry(self) -> dict[str, int | bool]:
        """Return what a checkpoint's map says of this module: the arguments that make it again."""
        return {
            "in_features": self.in_features,
            "out_features": self.out_features,
            "bias": self.bias is not None,
            "bits": self.bits,
            "group": self.group,
            **({"narrow": True} if self.narrow else {}),
        }

    def extra_repr(self) -> str:
        """Return the shape for printing."""
        group = f", group={self.group}" if self.group else ""
        return f"in_features={self.in_features}, out_features={self.out_features}, bits={self.bits}{group}"


def bits_of(layer: nn.Module) -> int:
    """Return in how few bits a layer, or each of its two factors, is stored; 0 where it is as the model has it."""
    held = layer if isinstance(layer, QuantizedLinear) else getattr(layer, "down", None)
    return held.bits if isinstance(held, QuantizedLinear) else 0


Inner = nn.Linear | QuantizedLinear  # a factor


def factor(
    in_features: int,
    out_features: int,
    bias: bool,
    bits: int,
    group: int,
    device: torch.device | str | None,
    dtype: torch.dtype | None,
) -> Inner:
    """Return an empty factor: of few bits, or a plain layer where ``bits`` is 0."""
    if bits:
        return QuantizedLinear(in_features, out_features, bias, bits, group, device=device, dtype=dtype)
    return nn.Linear(in_features, out_features, bias=bias, device=device, dtype=dtype)
