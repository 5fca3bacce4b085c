from typing import Any

import torch
from torch import nn

from pared.modules.shared import BasisHolder


class _Ordered(torch.autograd.Function):
    """Features in another order; the gradient is put back by the inverse order, where torch would add up one by one."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x_RN: torch.Tensor, order_N: torch.Tensor) -> torch.Tensor:
        return x_RN.index_select(1, order_N)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[torch.Tensor, torch.Tensor], output: torch.Tensor) -> None:  # noqa: ARG004 - torch's
        ctx.save_for_backward(inputs[1])
        ctx.save_for_forward(inputs[1])

    @staticmethod
    def backward(ctx: Any, *upstream: torch.Tensor) -> tuple[torch.Tensor, None]:
        (order_N,) = ctx.saved_tensors
        return _Ordered.apply(upstream[0], order_N.argsort()), None  # type: ignore[no-untyped-call]

    @staticmethod
    def jvp(ctx: Any, *tangents: torch.Tensor) -> torch.Tensor:
        (order_N,) = ctx.saved_tensors
        return _Ordered.apply(tangents[0], order_N)  # type: ignore[no-untyped-call]


def _is_trained(x: torch.Tensor) -> bool:
    """Whether a gradient will come back to this, and no graph is made of the code, which would lose it."""
    if not isinstance(x, torch.Tensor) or torch.compiler.is_compiling():
        return False
    if torch.jit.is_tracing():  # type: ignore[attr-defined,no-untyped-call]
        return False
    return torch.is_grad_enabled() and x.requires_grad


class PivotedLinear(BasisHolder):
    """A linear layer of rank k stored by k columns of its weight, and the others as combinations of those.

    ``y = up(x_p + down(x_r))``: ``x_p`` are the k features of the input whose columns are stored, the pivots, and
    ``x_r`` the other features. Both parts are real ``nn.Linear``s and are called as such, so that PEFT, ``Trainer`` and
    whatever looks for linear layers work on them; a change of ``up`` changes every column of the weight.

    Args:
        in_features: width of the input.
        out_features: width of the output.
        rank: number of pivot columns.
        bias: whether ``up`` has a bias.
        narrow: whether it has fewer inputs or outputs than the architecture's configuration says.

    Attributes:
        down: weight ``(rank, in - rank)``, no bias; None where every column is a pivot.
        up: weight ``(out, rank)``, the pivot columns, and the bias ``(out,)`` of the layer it replaces.
        order: int32 ``(in,)``; the pivots, then the other features.
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
        others = in_features - rank
        self.down = nn.Linear(others, rank, bias=False, device=device, dtype=dtype) if others else None
        self.up = nn.Linear(rank, out_features, bias=bias, device=device, dtype=dtype)
        self.order: torch.Tensor
        self.register_buffer("order", torch.arange(in_features, device=device, dtype=torch.int32))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map ``(..., in)`` to ``(..., out)``."""
        down = self.down
        x_p, x_r = self._in_order(x).split_with_sizes((self.rank, self.in_features - self.rank), -1)
        return self.up(x_p if down is None else x_p + down(x_r))

    def _in_order(self, x: torch.Tensor) -> torch.Tensor:
        """Put the pivots first and the other features after them, ``(..., in)``."""
        # On a CPU index_select over the last of two dimensions is nearly a copy; of three it is several times slower.
        x_RN = x.reshape(-1, self.in_features)
        if _is_trained(x):
            return _Ordered.apply(x_RN, self.order).view_as(x)  # type: ignore[no-untyped-call]
        return x_RN.index_select(1, self.order).view_as(x)

    @property
    def weight(self) -> torch.Tensor:
        """The dense weight ``(out, in)``, recomputed; for code that looks at a layer's weight."""
        columns = self.up.weight
        stored = columns if self.down is None else torch.cat((columns, columns @ self.down.weight), 1)
        return stored.index_select(1, self.order.argsort())

    @property
    def bias(self) -> torch.Tensor | None:
        """The bias ``(out,)``, that of ``up``."""
        return self.up.bias

    @property
    def pivots(self) -> torch.Tensor:
        """The columns of ``weight`` that ``up`` holds, in its order, int64 ``(rank,)``."""
        return self.order[: self.rank].long()

    @torch.no_grad()
    def set_weight(self, pivots: torch.Tensor, columns: torch.Tensor, coefficients: torch.Tensor) -> None:
        """Take the pivots ``(rank,)``, their columns ``(out, rank)`` and the others as ``(rank, in - rank)``.

        The others are the coefficients of the columns that are no pivots, in rising order.
        """
        is_other = torch.ones(self.in_features, dtype=torch.bool, device=pivots.device)
        is_other[pivots] = False
        self.order.copy_(torch.cat((pivots, is_other.nonzero().flatten())))
        self.up.weight.copy_(columns)
        if self.down is not None:
            self.down.weight.copy_(coefficients)

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
