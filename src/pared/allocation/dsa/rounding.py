"""How far rounding may have moved what an operator returns: by the magnitudes that went in, not by what came out.

Centring and dividing by a deviation, and means of what is centred, leave numbers that are rounding alone where all that
was there cancels: the mean of normalised scores is 1e-17 in one run and -3e-17 in the next, and a program of it would
hand out sparsities by chance. So every value carries an error bound. An operator that acts value by value is
evaluated at both ends of the bound; for the others the bound is that of the operands, carried through their sums.

Legend: ``x_N`` values with counts ``w_N`` and bounds ``e_N``; ``y`` is what the operator made of them.
"""

from collections.abc import Callable

import torch

from pared.allocation.dsa.operators import POST, PRE, mean_of, std_of

UNIT = 1e-13  # relative to an operand: some hundred times the rounding of float64, for sums over millions

Bound = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def moved(
    apply: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, e: torch.Tensor, y: torch.Tensor, unknown: float
) -> torch.Tensor:
    """Return how far a function of single values moves within their bounds.

    Args:
        apply: the function.
        x: values.
        e: bounds.
        y: ``apply(x)``.
        unknown: what stands where the function is undefined at both ends.
    """
    worst = torch.zeros_like(y)
    known = torch.zeros_like(y, dtype=torch.bool)
    for end in (apply(x + e), apply(x - e)):
        distance = (end - y).abs()
        worst = torch.where(distance.isfinite(), torch.maximum(worst, distance.nan_to_num()), worst)
        known |= distance.isfinite()
    return torch.where(known, worst, unknown) + UNIT * y.abs()


def of_vector(name: str, x_N: torch.Tensor, w_N: torch.Tensor, e_N: torch.Tensor, y_N: torch.Tensor) -> torch.Tensor:
    """Return bounds ``(N,)`` of what a function of a vector, by name, made of values with bounds."""
    if bound := _VECTOR.get(name):
        return bound(x_N, w_N, e_N, y_N)
    largest = float(y_N.abs().max())
    return moved(lambda values_N: PRE[name].apply(values_N, w_N), x_N, e_N, y_N, largest)


def of_reduction(name: str, x_N: torch.Tensor, w_N: torch.Tensor, e_N: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Return the bound ``()`` of what a reduction, by name, made of values with bounds."""
    return _REDUCTION[name](x_N, w_N, e_N, y)


def of_scalars(name: str, x_L: torch.Tensor, e_L: torch.Tensor, y_L: torch.Tensor) -> torch.Tensor:
    """Return bounds ``(L,)`` of what a function of a scalar, by name, made of those of all blocks."""
    return moved(POST[name].apply, x_L, e_L, y_L, torch.inf)


def _average(x_N: torch.Tensor, w_N: torch.Tensor) -> torch.Tensor:
    return (x_N * w_N).sum() / w_N.sum()


def _mean(x_N: torch.Tensor, w_N: torch.Tensor, e_N: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
    return _average(e_N, w_N) + UNIT * _average(x_N.abs(), w_N)


def _std(x_N: torch.Tensor, w_N: torch.Tensor, e_N: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
    """Return how far a deviation moves: no farther than the root mean square of what every value does."""
    more = (w_N.sum() - 1).clamp(min=1)
    operands_N = e_N + UNIT * (x_N.abs() + mean_of(x_N, w_N).abs())
    largest = operands_N.max()
    if largest == 0:
        return largest
    return largest * ((operands_N / largest).square() * w_N).sum().div(more).sqrt()


def _var(x_N: torch.Tensor, w_N: torch.Tensor, e_N: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    error = _std(x_N, w_N, e_N, y)
    return error * (2 * y.sqrt() + error) + UNIT * y


def _normalised(x_N: torch.Tensor, w_N: torch.Tensor, e_N: torch.Tensor, y_N: torch.Tensor) -> torch.Tensor:
    std = std_of(x_N, w_N)
    if not std > 0:
        return torch.zeros_like(x_N)  # all are equal: exactly zero
    own_N = e_N + UNIT * (x_N.abs() + mean_of(x_N, w_N).abs()) + _average(e_N, w_N)
    return own_N / std + y_N.abs() * (_std(x_N, w_N, e_N, y_N) / std + UNIT)


def _min_max(x_N: torch.Tensor, _: torch.Tensor, e_N: torch.Tensor, y_N: torch.Tensor) -> torch.Tensor:
    low, high = x_N.min(), x_N.max()
    ends_N = (x_N == low) | (x_N == high)  # exactly 0 and 1 whatever they are
    operands = e_N.max() + UNIT * torch.maximum(low.abs(), high.abs())
    width = (high - low).clamp(min=torch.finfo(x_N.dtype).tiny)
    return torch.where(ends_N, 0.0, (e_N + UNIT * x_N.abs() + 2 * operands) / width + UNIT * y_N.abs())


def _log_softmax(x_N: torch.Tensor, w_N: torch.Tensor, e_N: torch.Tensor, y_N: torch.Tensor) -> torch.Tensor:
    """Return what its own value and the sum over all, in which each counts by its share, move."""
    shares_N = y_N.exp() * w_N
    operands_N = x_N.abs() + x_N.abs().max()
    return e_N + (shares_N * e_N).sum() + UNIT * (operands_N + (y_N.abs()))


def _softmax(x_N: torch.Tensor, w_N: torch.Tensor, e_N: torch.Tensor, y_N: torch.Tensor) -> torch.Tensor:
    return y_N * _log_softmax(x_N, w_N, e_N, y_N.log()).nan_to_num(posinf=0.0)


def _geometric_mean(x_N: torch.Tensor, w_N: torch.Tensor, e_N: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    if y == 0:
        return y
    logs_N = x_N.abs().log()
    return y * (_average(e_N / x_N.abs(), w_N) + UNIT * (1 + _average(logs_N.abs(), w_N)))


def _norm2(x_N: torch.Tensor, w_N: torch.Tensor, e_N: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    del x_N
    return (e_N.square() * w_N).sum().sqrt() + UNIT * y


def _entropy(x_N: torch.Tensor, w_N: torch.Tensor, e_N: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    kept_N = x_N.clamp(min=0)
    total = (kept_N * w_N).sum()
    p_N = kept_N / total
    farthest_N = ((kept_N + e_N) / total).log().abs() + y.abs()  # of d(-p ln p) per dx, times the sum
    farthest_N = torch.where(e_N > 0, farthest_N, 0.0)
    return (farthest_N * e_N * w_N).sum() / total + UNIT * (torch.special.xlogy(p_N, p_N).abs() * w_N).sum()


def _paper_entropy(x_N: torch.Tensor, w_N: torch.Tensor, e_N: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
    slope_N = torch.where(e_N > 0, (x_N.abs() + e_N).log().abs() + 1, 0.0)
    return (slope_N * e_N * w_N).sum() + UNIT * (torch.special.xlogy(x_N, x_N).abs() * w_N).sum()


def _always_one(x_N: torch.Tensor, w_N: torch.Tensor, e_N: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    del x_N, w_N, e_N
    return UNIT * y.abs()


_VECTOR: dict[str, Bound] = {
    "NORMALIZE": _normalised,
    "NORM": _normalised,
    "MMS": _min_max,
    "SOFTMAX": _softmax,
    "LOGSOFTMAX": _log_softmax,
}

_REDUCTION: dict[str, Bound] = {
    "MEAN": _mean,
    "VAR": _var,
    "STD": _std,
    "GEOMETRIC_MEAN": _geometric_mean,
    "L1_NORM": _mean,
    "FROBENIUS_NORM": _norm2,
    "ENTROPY": _entropy,
    "PAPER_ENTROPY": _paper_entropy,
    "CORREF": _always_one,
    "RANK": _always_one,
}
