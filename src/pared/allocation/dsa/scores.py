"""What a program reads: numbers with counts, either a vector as it is or a histogram of any number of scores.

A histogram has 64 bins an octave, cut by the leading bits of a float32, and knows the count and the sum of each, so
that a bin's number is the mean of what fell into it; :class:`ScoreHistogram` says what that costs.
"""

import math
from dataclasses import dataclass, fields

import torch

from pared.errors import ParedError

BITS = 6  # of a float32's mantissa that tell bins apart
DROPPED = 23 - BITS
BINS = 0x7F800000 >> DROPPED  # up to infinity, which is refused
HIGHEST = torch.finfo(torch.float32).max  # one outlier beyond it is as high as any
CHUNK = 2**20  # scores taken in at a time


@dataclass(frozen=True, eq=False)
class Scores:
    """Numbers with counts; the same as a vector in which each is repeated as often as it counts.

    Attributes:
        values_N: float64 ``(N,)``.
        weights_N: how often each occurs, float64 ``(N,)``, above 0.
        lows_N: where what a value stands for begins; the value itself in a plain vector.
        highs_N: where it ends.
    """

    values_N: torch.Tensor
    weights_N: torch.Tensor
    lows_N: torch.Tensor
    highs_N: torch.Tensor

    @classmethod
    def of(cls, vector: torch.Tensor) -> "Scores":
        """Return the scores of a tensor of any shape, each counted once.

        Raises:
            ParedError: there are none, or one is not finite.
        """
        values_N = vector.detach().reshape(-1).double()
        if not len(values_N) or not bool(values_N.isfinite().all()):
            raise ParedError(f"{len(values_N)} scores, some not finite; expected at least one and all finite")
        return cls(values_N, torch.ones_like(values_N), values_N, values_N)

    @property
    def count(self) -> float:
        """How many scores there are."""
        return float(self.weights_N.sum())

    @property
    def mean(self) -> float:
        """Their mean."""
        return float((self.values_N * self.weights_N).sum()) / self.count

    def above(self, threshold: float) -> float:
        """Return how many scores are above a threshold; inside the bin that holds it, by linear interpolation."""
        width_N = self.highs_N - self.lows_N
        inside_N = ((self.highs_N - threshold) / width_N.clamp(min=torch.finfo(torch.float64).tiny)).clamp(0, 1)
        return float((self.weights_N * torch.where(width_N > 0, inside_N, (self.values_N > threshold).double())).sum())

    def scaled(self, factor: float) -> "Scores":
        """Return the scores times a positive number."""
        return Scores(self.values_N * factor, self.weights_N, self.lows_N * factor, self.highs_N * factor)


@dataclass(frozen=True)
class Moments:
    """Sums over all scores, exact up to float64 rounding; logarithms over those above 0.

    Attributes:
        count: of all.
        zeros: of those that are 0.
        total: the sum.
        squares: of squares.
        logs: of natural logarithms.
        squared_logs: of their squares.
        least: the smallest score.
        most: the largest.
    """

    count: int = 0
    zeros: int = 0
    total: float = 0.0
    squares: float = 0.0
    logs: float = 0.0
    squared_logs: float = 0.0
    least: float = math.inf
    most: float = -math.inf

    def __add__(self, other: "Moments") -> "Moments":
        """Return the moments of what both have seen."""
        names = [field.name for field in fields(self) if field.name not in ("least", "most")]
        sums = {name: getattr(self, name) + getattr(other, name) for name in names}
        return Moments(**sums, least=min(self.least, other.least), most=max(self.most, other.most))


class ScoreHistogram:
    """Non-negative scores in a quarter of a megabyte, however many there are.

    Covers float32 from its subnormals, where 64 bins share all below 1.2e-38, to 3.4e38, which also stands for what is
    larger; zeros are counted apart.

    Counts, the sum and the mean are exact. Everything else is off by what is lost inside a bin, measured against the
    vector of 200,000 log-normal (σ = 2 and 0.5), half-normal and Pareto (exponent 1.5) scores, three seeds each: a
    reduction of the scores by 1e-4 of its value at most (σ = 2: 5.5e-6); the mean and the variance after any function
    of a vector by 2e-4 of the standard deviation and of the variance (MMS of Pareto scores: 5e-4, for its minimum is a
    bin's mean). ``|ln x|`` before GEOMETRIC_MEAN has a pole at 1 and is off by 2e-3. A count above a threshold is off
    by less than its bin holds, 5e-3 of the count or two scores in the tail. tests/unit/test_program_scores.py measures
    every operator.

    Attributes:
        moments: exact sums, in addition to the bins.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        self.moments = Moments()
        self._counts_K = torch.zeros(BINS, dtype=torch.int64, device=device)
        self._sums_K = torch.zeros(BINS, dtype=torch.float64, device=device)

    def update(self, scores: torch.Tensor) -> None:
        """Take in scores of any shape and floating dtype.

        Raises:
            ParedError: one is negative or not finite; nothing of its chunk is taken in.
        """
        flat_N = scores.detach().reshape(-1)
        for start in range(0, len(flat_N), CHUNK):
            self._take(flat_N[start : start + CHUNK].to(self._sums_K.device).double())

    def merge(self, other: "ScoreHistogram") -> None:
        """Take in what another histogram has seen."""
        self.moments = self.moments + other.moments
        self._counts_K += other._counts_K.to(self._counts_K.device)
        self._sums_K += other._sums_K.to(self._sums_K.device)

    def scores(self) -> Scores:
        """Return what was seen, one number for every bin that is not empty.

        Raises:
            ParedError: nothing was seen.
        """
        if not self.moments.count:
            raise ParedError("a histogram of scores has seen none; there is nothing to allocate by")
        at_N = self._counts_K.nonzero().squeeze(1)
        weights_N, lows_N, highs_N = self._counts_K[at_N].double(), _edges(at_N), _edges(at_N + 1)
        parts = [self._sums_K[at_N] / weights_N, weights_N, lows_N, highs_N]
        if self.moments.zeros:
            zero = weights_N.new_zeros(1)
            parts = [torch.cat([zero + self.moments.zeros if part is weights_N else zero, part]) for part in parts]
        return Scores(*parts)

    def _take(self, x_N: torch.Tensor) -> None:
        if not len(x_N):
            return
        least, most = float(x_N.min()), float(x_N.max())
        if not (least >= 0 and most < math.inf):  # false for NaN too
            raise ParedError(f"scores from {least:g} to {most:g}; expected numbers from 0 on, all finite")
        most = min(most, HIGHEST)
        x_N = x_N.clamp(max=HIGHEST)
        positive_N = x_N[x_N > 0]
        bins_N = positive_N.float().view(torch.int32) >> DROPPED
        self._counts_K += torch.bincount(bins_N, minlength=BINS)
        self._sums_K += torch.bincount(bins_N, weights=positive_N, minlength=BINS)
        logs_N = positive_N.log()
        self.moments = self.moments + Moments(
            count=len(x_N),
            zeros=len(x_N) - len(positive_N),
            total=float(positive_N.sum()),
            squares=float(positive_N.square().sum()),
            logs=float(logs_N.sum()),
            squared_logs=float(logs_N.square().sum()),
            least=least,
            most=most,
        )


def as_scores(found: "Scores | ScoreHistogram | torch.Tensor") -> Scores:
    """Return scores of whatever holds them."""
    if isinstance(found, ScoreHistogram):
        return found.scores()
    return found if isinstance(found, Scores) else Scores.of(found)


def _edges(bins_N: torch.Tensor) -> torch.Tensor:
    """Return where bins begin, float64; the one after the last begins at the largest float32."""
    bits_N = (bins_N << DROPPED).clamp(max=0x7F7FFFFF)
    return bits_N.to(torch.int32).view(torch.float32).double()
