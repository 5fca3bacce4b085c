"""Two models on the same rows: differences with confidence intervals, and the chance of such ones by luck alone."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

RESAMPLED = 10_000  # times
LEVEL = 0.95
AT_ONCE = 1 << 22  # counts in memory


@dataclass(frozen=True)
class Difference:
    """How much one model differs from another on the same rows.

    Attributes:
        value: the difference of two means, or the quotient of two perplexities: the one over the other.
        low: the lower end of its 95% confidence interval, by bootstrap over rows; or windows.
        high: the upper end.
        rows: that both did; or windows.
        better: rows on which the one is better.
        worse: rows on which it is worse.
        p: of McNemar's exact test, where every row is right or wrong; None elsewhere.
    """

    value: float
    low: float
    high: float
    rows: int
    better: int
    worse: int
    p: float | None = None


def mcnemar(better: int, worse: int) -> float:
    """Return the chance that rows which differ split so unevenly, or more so, if either side were as likely.

    This is McNemar's test in its exact form, two-sided: the sign test on the rows that one model alone has right.

    Args:
        better: rows that the one has right alone.
        worse: rows that the other has right alone.
    """
    total = better + worse
    tail = sum(math.comb(total, count) for count in range(min(better, worse) + 1))
    return min(1.0, 2 * tail / 2**total)


def paired_difference(one: Sequence[float], other: Sequence[float], seed: int = 0) -> Difference:
    """Return the mean of one model over rows less that of another.

    Args:
        one: a value for every row, of which more is better.
        other: of the same rows, in the same order.
        seed: of the bootstrap.

    Raises:
        ValueError: there are not as many, or none.
    """
    _require_pairs(len(one), len(other))
    values = np.asarray(one, dtype=np.float64) - np.asarray(other, dtype=np.float64)
    distinct, counts = np.unique(values, return_counts=True)  # rows of one difference are drawn together
    drawn = np.random.default_rng(seed).multinomial(len(values), counts / len(values), size=RESAMPLED)
    low, high = _interval(drawn @ distinct / len(values))
    better, worse = int((values > 0).sum()), int((values < 0).sum())
    binary = set(one) | set(other) <= {0, 1}
    p = mcnemar(better, worse) if binary else None
    return Difference(float(values.mean()), low, high, len(values), better, worse, p)


def perplexity_quotient(
    one: Sequence[tuple[float, int]], other: Sequence[tuple[float, int]], seed: int = 0
) -> Difference:
    """Return the perplexity of one model as a multiple of another's; windows are drawn, with all their tokens.

    Args:
        one: nats and predicted tokens of every window.
        other: of the same windows.
        seed: of the bootstrap.

    Raises:
        ValueError: there are not as many windows, none, or not the same numbers of tokens.
    """
    _require_pairs(len(one), len(other))
    nats, tokens = np.asarray(one, dtype=np.float64).T
    others, same = np.asarray(other, dtype=np.float64).T
    if not np.array_equal(tokens, same):
        raise ValueError("the windows of the two models have other numbers of tokens")
    count, generator, quotients = len(tokens), np.random.default_rng(seed), []
    for _ in range(0, RESAMPLED, step := max(1, min(RESAMPLED, AT_ONCE // count))):
        drawn = generator.multinomial(count, np.full(count, 1 / count), size=step)
        quotients.append((drawn @ (nats - others)) / (drawn @ tokens))
    low, high = np.exp(_interval(np.concatenate(quotients)))
    value = math.exp((nats.sum() - others.sum()) / tokens.sum())
    better, worse = int((nats < others).sum()), int((nats > others).sum())
    return Difference(value, float(low), float(high), count, better, worse)


def _interval(values: np.ndarray) -> tuple[float, float]:
    low, high = np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def _require_pairs(one: int, other: int) -> None:
    if one != other or not one:
        raise ValueError(f"{one} rows and {other}: expected as many, and one at least")
