"""The operators of programs, by slot; weighted values in, and equal to the same on the expanded vector.

Where the DSA paper's table and the released code differ, the code's meaning has the code's name and the paper's the
prefix ``PAPER_`` (``NORM`` apart). MEAN, VAR, STD and GEOMETRIC_MEAN are the same in both. Nothing here writes to its
input, and what is undefined comes out as NaN or infinity, which evaluation refuses.

Decisions where neither table says enough:

- Of the reductions that need a matrix, two keep the meaning they have on a vector: CORREF, the paper's ``xᵀx / |x|²``,
  always 1 and so always refused as constant, and RANK, that of one row. GRAM, DIAGONAL, DETERMINANT and SLOGDET do not
  exist, and neither does NO_OP as a reduction: it leaves a vector.
- MMS divides by the range itself, not by the range plus 1e-9, so that it has no scale; of equal values it makes zeros.
- LOG of a vector is the code's, that of a scalar ``ln``, undefined at 0 and below.
- SIN, COS and TAN are undefined beyond a million: what they say there is decided by rounding.
- VAR and STD of values equal but for rounding are 0; of a single value they are undefined.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

NOISE = 1e-13  # deviations this small relative to the values are rounding
FARTHEST = 1e6  # argument of a periodic function

Vector = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Pre:
    """A function of a vector that keeps its length.

    Attributes:
        name: in a program's text.
        formula: what it does.
        apply: from values ``(N,)`` and their counts ``(N,)`` to values ``(N,)``.
    """

    name: str
    formula: str
    apply: Vector


@dataclass(frozen=True)
class Reduce:
    """A function of a vector to a scalar.

    Attributes:
        name: in a program's text.
        formula: what it does.
        apply: from values ``(N,)`` and their counts ``(N,)`` to ``()``.
    """

    name: str
    formula: str
    apply: Vector


@dataclass(frozen=True)
class Post:
    """A function of a scalar.

    Attributes:
        name: in a program's text.
        formula: what it does.
        apply: elementwise on the scalars of all blocks ``(L,)``.
    """

    name: str
    formula: str
    apply: Callable[[torch.Tensor], torch.Tensor]


def mean_of(x_N: torch.Tensor, w_N: torch.Tensor) -> torch.Tensor:
    """Return the mean, exactly the value where all are equal."""
    least = x_N.min()
    return least + ((x_N - least) * w_N).sum() / w_N.sum()


def std_of(x_N: torch.Tensor, w_N: torch.Tensor) -> torch.Tensor:
    """Return the unbiased standard deviation, without squaring anything large or small."""
    deviation_N = x_N - mean_of(x_N, w_N)
    largest, more = deviation_N.abs().max(), w_N.sum() - 1
    if not more > 0:
        return largest.new_tensor(torch.nan)
    if largest <= NOISE * x_N.abs().max():
        return largest.new_zeros(())
    return largest * ((deviation_N / largest).square() * w_N).sum().div(more).sqrt()


def _norm(x_N: torch.Tensor, w_N: torch.Tensor) -> torch.Tensor:
    return (x_N - mean_of(x_N, w_N)) / std_of(x_N, w_N)


def _normalize(x_N: torch.Tensor, w_N: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(x_N) if std_of(x_N, w_N) == 0 else _norm(x_N, w_N)


def _min_max(x_N: torch.Tensor, w_N: torch.Tensor) -> torch.Tensor:
    del w_N
    low, high = x_N.min(), x_N.max()
    equal = high - low <= NOISE * torch.maximum(low.abs(), high.abs())
    return torch.zeros_like(x_N) if equal else (x_N - low) / (high - low)


def _log_softmax(x_N: torch.Tensor, w_N: torch.Tensor) -> torch.Tensor:
    shifted_N = x_N - x_N.max()
    return shifted_N - (shifted_N.exp() * w_N).sum().log()


def _geometric_mean(x_N: torch.Tensor, w_N: torch.Tensor) -> torch.Tensor:
    if x_N.min() == 0:
        return x_N.new_zeros(())
    return mean_of(x_N.log(), w_N).exp()


def _norm2(x_N: torch.Tensor, w_N: torch.Tensor) -> torch.Tensor:
    largest = x_N.abs().max()
    return largest if largest == 0 else largest * ((x_N / largest).square() * w_N).sum().sqrt()


def _corref(x_N: torch.Tensor, w_N: torch.Tensor) -> torch.Tensor:
    unit_N = x_N / x_N.abs().max()
    return (unit_N * unit_N * w_N).sum() / (unit_N.square() * w_N).sum()


def _entropy(x_N: torch.Tensor, w_N: torch.Tensor) -> torch.Tensor:
    kept_N = x_N.clamp(min=0)
    kept_N = kept_N / kept_N.max()
    p_N = kept_N / (kept_N * w_N).sum()
    return -(torch.special.xlogy(p_N, p_N) * w_N).sum()


def _elementwise(function: Callable[[torch.Tensor], torch.Tensor]) -> Vector:
    return lambda x_N, _: function(x_N)


def _periodic(function: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda x_L: torch.where(x_L.abs() <= FARTHEST, function(x_L), torch.nan)


def _same(x: torch.Tensor) -> torch.Tensor:
    return x.clone()


PRE = {
    operator.name: operator
    for operator in (
        Pre("NO_OP", "x", _elementwise(_same)),
        Pre("ABS", "|x|", _elementwise(torch.abs)),
        Pre("LOG", "ln(x + 1e-6), of 1 in place of values ≤ 0",
            _elementwise(lambda x_N: torch.where(x_N <= 0, 1.0, x_N).add(1e-6).log())),
        Pre("PAPER_LOG", "ln x", _elementwise(torch.log)),
        Pre("ABSLOG", "ln |x|, of 1 in place of zeros",
            _elementwise(lambda x_N: torch.where(x_N == 0, 1.0, x_N).abs().log())),
        Pre("PAPER_ABSLOG", "|ln x|", _elementwise(lambda x_N: x_N.log().abs())),
        Pre("POW", "x²", _elementwise(torch.square)),
        Pre("SQRT", "√x", _elementwise(torch.sqrt)),
        Pre("EXP", "exp x", _elementwise(torch.exp)),
        Pre("NORMALIZE", "(x - mean) / std, zeros where std is 0", _normalize),
        Pre("NORM", "(x - mean) / std", _norm),
        Pre("MMS", "(x - min) / (max - min), zeros where all are equal", _min_max),
        Pre("SIGMOID", "1 / (1 + exp(-x))", _elementwise(torch.sigmoid)),
        Pre("TANH", "tanh x", _elementwise(torch.tanh)),
        Pre("SOFTMAX", "exp x / Σ exp x", lambda x_N, w_N: _log_softmax(x_N, w_N).exp()),
        Pre("LOGSOFTMAX", "x - ln Σ exp x", _log_softmax),
    )
}  # fmt: skip

REDUCE = {
    operator.name: operator
    for operator in (
        Reduce("MEAN", "Σ x / n", mean_of),
        Reduce("VAR", "Σ (x - mean)² / (n - 1)", lambda x_N, w_N: std_of(x_N, w_N).square()),
        Reduce("STD", "√VAR", std_of),
        Reduce("GEOMETRIC_MEAN", "exp(Σ ln x / n), 0 where a value is 0", _geometric_mean),
        Reduce("L1_NORM", "Σ |x| / n", lambda x_N, w_N: mean_of(x_N.abs(), w_N)),
        Reduce("FROBENIUS_NORM", "√(Σ x²)", _norm2),
        Reduce("ENTROPY", "-Σ p ln p, p = x / Σ x over values above 0", _entropy),
        Reduce("PAPER_ENTROPY", "-Σ x ln x", lambda x_N, w_N: -(torch.special.xlogy(x_N, x_N) * w_N).sum()),
        Reduce("CORREF", "xᵀx / |x|², which is 1", _corref),
        Reduce("RANK", "that of the vector as one row: 1, or 0 if all is 0", lambda x_N, _: (x_N != 0).any().double()),
    )
}  # fmt: skip

POST = {
    operator.name: operator
    for operator in (
        Post("NO_OP", "y", _same),
        Post("SIN", "sin y, |y| ≤ 1e6", _periodic(torch.sin)),
        Post("COS", "cos y, |y| ≤ 1e6", _periodic(torch.cos)),
        Post("TAN", "tan y, |y| ≤ 1e6", _periodic(torch.tan)),
        Post("ASIN", "asin y, |y| ≤ 1", torch.asin),
        Post("ACOS", "acos y, |y| ≤ 1", torch.acos),
        Post("ATAN", "atan y", torch.atan),
        Post("EXP", "exp y", torch.exp),
        Post("LOG", "ln y, y > 0", torch.log),
        Post("SQRT", "√y", torch.sqrt),
        Post("ABS", "|y|", torch.abs),
        Post("SIGMOID", "1 / (1 + exp(-y))", torch.sigmoid),
        Post("TANH", "tanh y", torch.tanh),
        Post("SOFTPLUS", "ln(1 + exp y)", lambda y_L: torch.logaddexp(y_L, torch.zeros_like(y_L))),
    )
}
