import torch
from torch import nn


class PivotedLinear(nn.Module):
    """A linear layer of rank k stored by k of its own rows, and the others as combinations of those.

    ``y_p = down(x)`` are the outputs of the k pivot rows, ``up(y_p)`` those of the others; both are then put in their
    places. Both parts are real ``nn.Linear``s, so that PEFT, ``Trainer`` and whatever looks for linear layers work on
    them; a change of ``up`` changes the rows that are no pivots.

    Args:
        in_features: width of the input.
        out_features: width of the output.
        rank: number of pivot rows.
        bias: whether there is a bias.

    Attributes:
        down: weight ``(rank, in)``, the pivot rows; no bias.
        up: weight ``(out - rank, rank)``, no bias; None where every row is a pivot.
        order: int32 ``(out,)``; output i is element ``order[i]`` of ``down``'s outputs followed by ``up``'s.
        bias: ``(out,)`` of the layer it replaces, or None.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        bias: bool,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.rank = in_features, out_features, rank
        self.down = nn.Linear(in_features, rank, bias=False, device=device, dtype=dtype)
        others = out_features - rank
        self.up = nn.Linear(rank, others, bias=False, device=device, dtype=dtype) if others else None
        self.bias = nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype)) if bias else None
        self.order: torch.Tensor
        self.register_buffer("order", torch.arange(out_features, device=device, dtype=torch.int32))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map ``(..., in)`` to ``(..., out)``."""
        y, up, bias = self.down(x), self.up, self.bias  # (..., rank)
        if up is not None:
            y = self._in_order(torch.cat((y, up(y)), -1))  # (..., out)
        return y if bias is None else y + bias

    def _in_order(self, y: torch.Tensor) -> torch.Tensor:
        """Put the pivots' outputs and the others' in their places, ``(..., out)``."""
        # On a CPU index_select over the last of two dimensions is nearly a copy; of three it is several times slower.
        return y.view(-1, self.out_features).index_select(1, self.order).view(y.shape)

    @property
    def weight(self) -> torch.Tensor:
        """The dense weight ``(out, in)``, computed anew; for code that looks at a layer's weight."""
        rows = self.down.weight
        return rows if self.up is None else torch.cat((rows, self.up.weight @ rows)).index_select(0, self.order)

    @property
    def pivots(self) -> torch.Tensor:
        """The rows of ``weight`` that ``down`` holds, in its order, int64 ``(rank,)``."""
        return self.order.argsort()[: self.rank]

    @torch.no_grad()
    def set_weight(self, pivots: torch.Tensor, rows: torch.Tensor, coefficients: torch.Tensor) -> None:
        """Take the pivots ``(rank,)``, their rows ``(rank, in)`` and the others' coefficients ``(out - rank, rank)``.

        The others are the rows that are no pivots, in rising order.
        """
        is_other = torch.ones(self.out_features, dtype=torch.bool, device=pivots.device)
        is_other[pivots] = False
        self.order.copy_(torch.cat((pivots, is_other.nonzero().flatten())).argsort())
        self.down.weight.copy_(rows)
        if self.up is not None:
            self.up.weight.copy_(coefficients)

    def entry(self) -> dict[str, int | bool]:
        """Return what a checkpoint's map says of this module: the arguments that make it again."""
        return {
            "in_features": self.in_features,
            "out_features": self.out_features,
            "rank": self.rank,
            "bias": self.bias is not None,
        }

    def extra_repr(self) -> str:
        """Return the shape for printing."""
        return f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}"
