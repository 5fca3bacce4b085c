"""A pruned linear layer: dense while it computes, packed in whatever is saved."""

from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional

from pared.modules.packing import (
    lost_weights,
    pack,
    pack_nm,
    packed_bytes,
    stored_values,
    unpack,
    unpack_mask,
    unpack_nm,
)


class NMGroups(NamedTuple):
    """N:M: N weights are stored of every M consecutive inputs of an output."""

    kept: int
    group: int


class SparseLinear(nn.Linear):
    """A linear layer some of whose weights are zero and are not saved.

    It is an ``nn.Linear`` with a dense ``weight``, for products, Trainer and PEFT. Its state has ``values``, the stored
    weights in order, and ``bits``, where they stand, in place of ``weight``; a state with ``weight`` is read too. A new
    one is *packed*: it has no weight but room for ``values``, as transformers fills parameters by name;
    :meth:`unpack_` makes the weight. While it is packed it multiplies all the same, unpacking again every time.

    In training it computes with zeros where nothing is stored, so no gradient reaches these weights: whatever trains
    it, its zeros stay. What an optimiser makes of them all the same (Muon, noise) has no effect on any output, and is
    set to zero before the layer is evaluated or saved.

    Args:
        in_features: width of the input.
        out_features: width of the output.
        bias: whether there is a bias.
        stored: how many weights are stored.
        kept: N of N:M; 0 if zeros are anywhere.
        group: M of N:M; 0 if zeros are anywhere.

    Attributes:
        weight: dense ``(out, in)``; while packed one zero seen as so many, as models' own initialisation looks at it.
        values: the stored weights ``(stored,)``; None once unpacked.
        bits: uint8 ``(bytes,)``, one bit a weight, or for N:M the places, if less; :mod:`pared.modules.packing`.
    """

    _trained = False

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool,
        stored: int,
        kept: int = 0,
        group: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        nn.Module.__init__(self)  # that of nn.Linear would make a dense weight
        self.in_features, self.out_features, self.stored = in_features, out_features, stored
        self.groups = NMGroups(kept, group) if group else None
        # No parameter, so not saved, and of one number; but of the shape and kind that code of architectures looks at.
        self.weight = torch.zeros(1, device=device, dtype=dtype).expand(out_features, in_features)
        self.weight._is_hf_initialized = True  # type: ignore[attr-defined]  # transformers would, slowly
        self.values: Any = nn.Parameter(torch.zeros(stored, device=device, dtype=dtype))
        self.bits: torch.Tensor
        bits = packed_bytes((out_features, in_features), self.groups)
        self.register_buffer("bits", torch.zeros(bits, device=device, dtype=torch.uint8))
        self.register_parameter("bias", nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype)) if bias
                                else None)  # fmt: skip

    @classmethod
    def of(
        cls, weight_ON: torch.Tensor, mask_ON: torch.Tensor, bias_O: torch.Tensor | None, groups: NMGroups | None = None
    ) -> "SparseLinear":
        """Return an unpacked layer of this weight ``(out, in)``, of which the mask is True where it is stored.

        Raises:
            ValueError: a weight outside of the mask is not zero, or a group stores more than N.
        """
        packed = pack(weight_ON, mask_ON) if groups is None else pack_nm(weight_ON, mask_ON, groups)
        kept, group = groups or (0, 0)
        new = cls(
            in_features=weight_ON.shape[1],
            out_features=len(weight_ON),
            bias=bias_O is not None,
            stored=packed.values.numel(),
            kept=kept,
            group=group,
            device=weight_ON.device,
            dtype=weight_ON.dtype,
        )
        with torch.no_grad():
            new.values.copy_(packed.values.flatten())
            new.bits.copy_(packed.bits)
            if bias_O is not None:
                new.bias.copy_(bias_O)
        new.unpack_()
        return new

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map ``(..., in)`` to ``(..., out)``."""
        weight = self._dense(self.values) if self.packed else self.weight
        if self.training and weight.requires_grad and torch.is_grad_enabled() and not self.packed:
            self._trained = True
            weight = torch.where(self.mask, weight, 0)
        return functional.linear(x, weight, self.bias)

    def train(self, mode: bool = True) -> "SparseLinear":
        """Set as torch does; zeros that training moved are zeros again before anything is evaluated."""
        super().train(mode)
        if not mode:
            self._put_back()
        return self

    @property
    def packed(self) -> bool:
        """Whether there is no dense weight yet."""
        return self.values is not None

    @property
    def mask(self) -> torch.Tensor:
        """True where a weight is stored, bool ``(out, in)``."""
        shape = (self.out_features, self.in_features)
        if self.groups is None:
            return unpack_mask(self.bits, shape)
        ones = torch.ones(self.stored, dtype=torch.uint8, device=self.bits.device)
        return unpack_nm(ones.view(self.out_features, -1), self.bits, shape, self.groups).bool()

    @torch.no_grad()
    def unpack_(self) -> None:
        """Make the dense weight from what is stored, in place; nothing happens if that was done.

        Raises:
            ValueError: values and bits do not fit each other.
        """
        if self.packed:
            dense = nn.Parameter(self._dense(self.values.detach()), self.values.requires_grad)
            self.values = None
            del self.weight
            self.weight = dense

    @torch.no_grad()
    def keep_zeros_(self) -> None:
        """Put zeros where no weight is stored, in place: after an optimiser's step, or a merge."""
        self.weight.masked_fill_(~self.mask, 0)

    def _put_back(self) -> None:
        """Put zeros where an optimiser moved weights that no output was computed with."""
        if self._trained and not self.packed:
            self.keep_zeros_()
            self._trained = False

    def _dense(self, values: torch.Tensor) -> torch.Tensor:
        shape = (self.out_features, self.in_features)
        if self.groups is None:
            return unpack(values, self.bits, shape)
        return unpack_nm(values.view(self.out_features, -1), self.bits, shape, self.groups)

    def _stored(self) -> torch.Tensor:
        """Return the stored weights of the dense one.

        Raises:
            ValueError: a weight where none is stored is not zero, and would be lost.
        """
        mask_ON = self.mask
        if lost := lost_weights(self.weight, mask_ON):
            raise ValueError(
                f"{lost} weights of a sparse layer are not zero where its pattern has zeros, and would not be saved: "
                "it was trained or merged without its mask; call keep_zeros_() on it, or export it dense"
            )
        if self.groups is None:
            return stored_values(self.weight.detach(), mask_ON)
        return pack_nm(self.weight.detach(), mask_ON, self.groups).values.flatten()

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        self._put_back()
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if not self.packed:
            del destination[prefix + "weight"]
            destination[prefix + "values"] = self._stored()

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        """Read values and bits, or a dense weight, into a packed or an unpacked layer."""
        values = state_dict.get(prefix + "values")
        if values is not None and not self.packed:
            self.bits.copy_(state_dict[prefix + "bits"])
            state_dict = {name: tensor for name, tensor in state_dict.items() if name != prefix + "values"}
            state_dict[prefix + "weight"] = self._dense(values)
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def entry(self) -> dict[str, int | bool]:
        """Return what a checkpoint's map says of this module: the arguments that make it again."""
        kept, group = self.groups or (0, 0)
        return {
            "in_features": self.in_features,
            "out_features": self.out_features,
            "bias": self.bias is not None,
            "stored": self.stored,
            "kept": kept,
            "group": group,
        }

    def extra_repr(self) -> str:
        """Return the shape for printing."""
        pattern = f", pattern={self.groups.kept}:{self.groups.group}" if self.groups else ""
        return f"in_features={self.in_features}, out_features={self.out_features}, stored={self.stored}{pattern}"
