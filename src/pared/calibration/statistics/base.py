"""What a statistic is: a small accumulator with ``update`` and ``merge``, for one process or many."""

from collections.abc import Mapping
from typing import Literal, Protocol, TypeVar

import torch
from torch import distributed

from pared.calibration.statistics.sums import sum_over_ranks
from pared.errors import ParedError

# Rows that are converted to float32 at a time, so that what was converted is still in a cache when it is used.
PRODUCT_ROWS, SUM_ROWS = 4096, 256

Of = Literal["input", "output", "output_grad", "weight_grad", "input_pair"]
State = Mapping[str, torch.Tensor]


class StatisticView(Protocol):
    """What a method is given: the value of a statistic, and over how many tokens."""

    @property
    def tokens(self) -> int:
        """How many tokens were seen; 0 if none reached the site."""

    @property
    def value(self) -> torch.Tensor:
        """The statistic over everything seen so far; not to be changed."""


class Statistic(StatisticView, Protocol):
    """One accumulator of what happens at a site, forward or backward."""

    @property
    def of(self) -> Of:
        """What it watches, and so what :meth:`update` is given.

        ``input`` is collected once for all sites that read one tensor; ``output`` is a site's own output without its
        bias; ``output_grad`` the gradient of the summed loss with respect to that; ``weight_grad`` needs input and
        gradient; ``input_pair`` is what a site reads on two paths.
        """

    @property
    def by_example(self) -> bool:
        """Whether the examples of a batch must be told apart: one update holds whole examples, ``(B, T, features)``."""

    @property
    def features(self) -> int:
        """How many features it was made for: of the tensor it watches, or of what the site reads."""

    @property
    def signature(self) -> str:
        """Its kind, width and options, in words; what has an equal one can be merged."""

    def update(self, x: torch.Tensor, grad: torch.Tensor | None = None, /) -> None:
        """Take in one batch.

        Args:
            x: what the site reads ``(..., in)``; outputs ``(..., out)``, for ``output``; reads on the dense path, for
                ``input_pair``.
            grad: with respect to what the site outputs, ``(..., out)``, read by ``output_grad`` and ``weight_grad``
                alone, so that a statistic of inputs may be collected in a backward pass; what the site reads on its
                own path, for ``input_pair``.
        """

    def merge(self, other: "Statistic", /) -> None:
        """Add what another of the same kind has seen.

        Raises:
            ParedError: it is of another kind or width.
        """

    def all_reduce(self, group: distributed.ProcessGroup | None = None) -> None:
        """Add up what the ranks of a group have seen; each of them then holds all of it, bit for bit the same.

        Every rank calls this for the same statistics in the same order, which
        :func:`~pared.calibration.statistics.all_reduce` checks and does for many sites.

        Args:
            group: of processes, on any backend; the default one if none is given. Without processes nothing is done.
        """

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Return all that is held, exactly; the tensors are the accumulator's own and change with it."""

    def load_state_dict(self, state: State) -> None:
        """Hold a copy of what :meth:`state_dict` gave, and resume from there to the same bits.

        Raises:
            ParedError: it is of another kind or width.
        """

    def finite(self) -> bool:
        """Whether everything seen so far was a finite number."""


S = TypeVar("S", bound=Statistic)


def same_kind(own: S, other: Statistic) -> S:
    """Return the other statistic, if it is one of the same kind, as wide, of the same tensor.

    Raises:
        ParedError: it is not.
    """
    if isinstance(other, type(own)) and own.signature == other.signature:
        return other
    raise ParedError(f"cannot merge {other.signature} into {own.signature}; merge statistics of one name and width")


class Summed:
    """A statistic that is made of one float64 sum over tokens; what is added is each kind's own.

    Attributes:
        of: what it watches.
        by_example: False.
        features: that it was made for.
        tokens: how many tokens were seen.
    """

    by_example = False

    def __init__(self, features: int, shape: tuple[int, ...], device: torch.device, of: Of) -> None:
        self.of, self.features, self.tokens = of, features, 0
        self._sum = torch.zeros(shape, dtype=torch.float64, device=device)

    @property
    def signature(self) -> str:
        """Its kind and width, in words."""
        return f"{type(self).__name__} of {self.features} features ({self.of})"

    @property
    def value(self) -> torch.Tensor:
        """The sum."""
        return self._sum

    def update(self, x: torch.Tensor, grad: torch.Tensor | None = None) -> None:
        """Take in one batch."""
        raise NotImplementedError

    def merge(self, other: Statistic) -> None:
        """Add what another of the same kind has seen."""
        other = same_kind(self, other)
        self._sum += other._sum.to(self._sum.device)
        self.tokens += other.tokens

    def all_reduce(self, group: distributed.ProcessGroup | None = None) -> None:
        """Add up what the ranks of a group have seen; each then holds all of it."""
        self.tokens = sum_over_ranks(self._sum, self.tokens, group)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Return the sum, float64, and the tokens."""
        return {"sum": self._sum, "tokens": torch.tensor(self.tokens)}

    def load_state_dict(self, state: State) -> None:
        """Hold a copy of such a state.

        Raises:
            ParedError: it is of another kind or width.
        """
        if "sum" not in state or state["sum"].shape != self._sum.shape:
            found = tuple(state["sum"].shape) if "sum" in state else "none"
            raise ParedError(
                f"{self.signature}: expected a saved sum of shape {tuple(self._sum.shape)}, got {found}; "
                "load what the same statistic has saved"
            )
        self._sum = state["sum"].to(self._sum, copy=True)
        self.tokens = int(state["tokens"])

    def finite(self) -> bool:
        """Whether everything seen so far was a finite number."""
        return bool(self._sum.isfinite().all())
