import torch
from torch import nn

from pared.modules.shared import BasisHolder


class LowRankLinear(BasisHolder):
    """Two linear layers in place of one: ``y = up(down(x))``.

    Both are real ``nn.Linear``s, so that PEFT, ``Trainer`` and whatever looks for linear layers work on them.

    Args:
        in_features: width of the input.
        out_features: width of the output.
        rank: width between the two.
        bias: whether ``up`` has a bias.
        narrow: whether it has fewer inputs or outputs than the architecture's configuration says.

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
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.rank, self.narrow = in_features, out_features, rank, narrow
        self.down = nn.Linear(in_features, rank, bias=False, device=device, dtype=dtype)
        self.up = nn.Linear(rank, out_features, bias=bias, device=device, dtype=dtype)

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
        }

    def extra_repr(self) -> str:
        """Return the shape for printing."""
        return f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}"
