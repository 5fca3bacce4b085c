import torch

from pared.modules.quantized import Inner, factor
from pared.modules.shared import BasisHolder


class LowRankLinear(BasisHolder):
    """Two linear layers in place of one: ``y = up(down(x))``.

    Both are real ``nn.Linear``s, so that PEFT, ``Trainer`` and whatever looks for linear layers work on them, or both
    are stored in few bits.

    Args:
        in_features: width of the input.
        out_features: width of the output.
        rank: width between the two.
        bias: whether ``up`` has a bias.
        narrow: whether it has fewer inputs or outputs than the architecture's configuration says.
        bits: of a number of a factor, 8 or 4; 0 for factors of ``dtype``.
        group: as of a :class:`QuantizedLinear`.

    Attributes:
        down: weight ``(rank, in)``, no bias.
        up: weight ``(out, rank)`` and the bias ``(out,)`` of the layer it replaces.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        bias: bool,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        narrow: bool = False,
        bits: int = 0,
        group: int = 0,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.rank, self.narrow = in_features, out_features, rank, narrow
        self.bits, self.group = bits, group
        self.down: Inner = factor(in_features, rank, False, bits, group, device, dtype)
        self.up: Inner = factor(rank, out_features, bias, bits, group, device, dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map ``(..., in)`` to ``(..., out)``."""
        return self.up(self.down(x))

    @property
    def weight(self) -> torch.Tensor:
        """The dense weight ``up @ down`` ``(out, in)``, recomputed; for code that looks at a layer's weight."""
        return self.up.weight @ self.down.weight

    @property
    def bias(self) -> torch.Tensor | None:
        """The bias ``(out,)``, that of ``up``."""
        return self.up.bias

    def entry(self) -> dict[str, int | bool]:
        """Return what a checkpoint's map says of this module: the arguments that make it again."""
        return {
            "in_features": self.in_features,
            "out_features": self.out_features,
            "rank": self.rank,
            "bias": self.up.bias is not None,
            **({"narrow": True} if self.narrow else {}),
            **({"bits": self.bits, "group": self.group} if self.bits else {}),
        }

    def extra_repr(self) -> str:
        """Return the shape for printing."""
        return f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}"
