"""What a statistic is: a small accumulator with ``update`` and ``merge``, for one process or many."""

from collections.abc import Mapping
from typing import ClassVar, Literal, Protocol, TypeVar

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
            grad: with respect to what the site outputs, ``(..., out)``, of several draws of labels side by side where
                the statistic is an ``output_grad``; read by ``output_grad`` and ``weight_grad``
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
        beside: tensors that add up as the sum does, by the names of attributes, with what messages call them.
        of: what it watches.
        by_example: False.
        features: that it was made for.
        tokens: how many tokens were seen.
    """

    beside: ClassVar[Mapping[str, str]] = {}
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
        for name in self.beside:
            mine: torch.Tensor = getattr(self, name)
            mine += getattr(other, name).to(mine.device)

    def all_reduce(self, group: distributed.ProcessGroup | None = None) -> None:
        """Add up what the ranks of a group have seen; each then holds all of it."""
        self.tokens = sum_over_ranks(self._sum, self.tokens, group)
        for name in self.beside:
            sum_over_ranks(getattr(self, name), self.tokens, group)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Return the sums, float64, and the tokens."""
        beside = {name: getattr(self, name) for name in self.beside}
        return {"sum": self._sum, "tokens": torch.tensor(self.tokens), **beside}

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
        for name, what in self.beside.items():
            if name not in state:
                raise ParedError(f"{self.signature}: got a state without {what}; collect the statistics again")
        self._sum = state["sum"].to(self._sum, copy=True)
        self.tokens = int(state["tokens"])
        for name in self.beside:
            setattr(self, name, state[name].to(getattr(self, name), copy=True))

    def finite(self) -> bool:
        """Whether everything seen so far was a finite number."""
        return bool(self._sum.isfinite().all())


class Moments(Summed):
    """A sum of second moments over tokens, and of their squares, which say how well the second moments are known.

    Attributes:
        fourth: the sum over tokens of the squared Frobenius norm of what each adds, 0-d, float64.
    """

    beside: ClassVar[Mapping[str, str]] = {"fourth": "fourth moments"}

    def __init__(self, features: int, shape: tuple[int, ...], device: torch.device, of: Of) -> None:
        super().__init__(features, shape, device, of)
        self.fourth = torch.zeros((), dtype=torch.float64, device=device)

    @property
    def shrinkage(self) -> float:
        """How far the sum is to be drawn towards equal energies, 0 to 1; see :func:`least_error_shrinkage`."""
        return least_error_shrinkage(self._sum_of_squares(), self._trace(), self.fourth, self.features, self.tokens)

    def _sum_of_squares(self) -> torch.Tensor:
        """Return the squared Frobenius norm of the sum."""
        raise NotImplementedError

    def _trace(self) -> torch.Tensor:
        """Return the summed energy of all features."""
        raise NotImplementedError


def squares(x_TN: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the square of every number, and their sums over rows; float32, float64 where a sum leaves that."""
    squares_TN = x_TN.float().square()
    energy_N = squares_TN.sum(dim=0)
    if not bool(energy_N.isfinite().all()):
        squares_TN = x_TN.double().square()
        energy_N = squares_TN.sum(dim=0)
    return squares_TN, energy_N


def norm(x: torch.Tensor, dim: int | None = None) -> torch.Tensor:
    """Return the Euclidean norm over one axis or all, float64; added up in float32 unless its squares leave that.

    Every batch goes through this: a copy of it in float64 would take a quarter of the time of its Gram.
    """
    found = torch.linalg.vector_norm(x, dim=dim)
    if not bool(found.isfinite().all()):
        found = torch.linalg.vector_norm(x, dim=dim, dtype=torch.float64)
    return found.double()


def least_error_shrinkage(
    squares: torch.Tensor, trace: torch.Tensor, fourth: torch.Tensor, features: int, tokens: int
) -> float:
    """Return the ``a`` for which ``(1 - a) S + a mean(diag S) I`` comes closest to what ``S`` estimates.

    Ledoit and Wolf (Journal of Multivariate Analysis 88, 2004), for second moments about zero: the variance of the
    mean over tokens, which fourth moments tell, over its distance from equal energies; Frobenius norm, tokens taken as
    independent. It does not depend on the unit of what is measured, and falls with one over the tokens.

    Args:
        squares: squared Frobenius norm of the sum over tokens ``T S``, of a matrix or of its diagonal alone.
        trace: of that sum.
        fourth: summed squared Frobenius norm of what each token added.
        features: the width.
        tokens: how many there were.
    """
    if tokens < 2:  # one token tells nothing of how much they vary
        return float(tokens)
    square = float(squares) / tokens**2
    distance = square - (float(trace) / tokens) ** 2 / features
    variance = (float(fourth) / tokens - square) / tokens
    return min(1.0, variance / distance) if distance > 0 and variance > 0 else 0.0
