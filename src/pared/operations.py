"""Operations of known size, of which the cost of a compression is added up: data, without a time.

What a method's ``solve`` does is declared beside it as such operations; what blocks do is traced. How long one takes is
measured, or computed from published rates (:mod:`pared.engine.cost`).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

ITEMSIZE = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class Operation:
    """One operation, or one as often as it happens.

    Attributes:
        kind: one of ``KINDS``.
        sizes: of it, as its kind has them.
        dtype: computed in.
        times: how often; a part of one where it was traced on fewer or more tokens.
        call: of an operation that was traced, what it was called with; of kind ``call`` only.
    """

    kind: str
    sizes: tuple[int, ...]
    dtype: str = "float64"
    times: float = 1.0
    call: Any = None

    @property
    def flops(self) -> float:
        """Floating point operations of it once, by the usual count."""
        return KINDS[self.kind].flops(*self.sizes)

    @property
    def bytes(self) -> float:
        """Bytes that are read and written of it once, each number once."""
        return KINDS[self.kind].numbers(*self.sizes) * ITEMSIZE.get(self.dtype, 1)


class Kind(NamedTuple):
    """What an operation costs of arithmetic and memory, from its sizes.

    Attributes:
        flops: from the sizes to the operations.
        numbers: from the sizes to the numbers read and written, each once.
        meaning: of the sizes.
    """

    flops: Callable[..., float]
    numbers: Callable[..., float]
    meaning: str


def _none(*_: int) -> float:
    return 0.0


def _removed(out: int, channels: int) -> float:
    """Return the operations of taking out every channel, one by one: on the inverse, the weight, and for scores."""
    return 2 / 3 * channels**3 + 1.0 * out * channels**2 + 512.0 * out * channels


def _identity(count: int) -> float:
    return float(count)


KINDS: dict[str, Kind] = {
    "product": Kind(
        lambda m, k, n: 2.0 * m * k * n, lambda m, k, n: m * k + k * n + m * n, "(m, k) times (k, n)"
    ),
    "attention": Kind(
        lambda b, h, t, d: 2.0 * b * h * t * t * d, lambda b, h, t, d: 4 * b * h * t * d,
        "batch, heads, tokens, width of a head; causal, so that half of all pairs count",
    ),
    "attention back": Kind(
        lambda b, h, t, d: 5.0 * b * h * t * t * d, lambda b, h, t, d: 8 * b * h * t * d, "as of attention"
    ),
    "call": Kind(_none, _identity, "numbers read and written by one call that was traced"),
    "stream": Kind(_none, _identity, "numbers read and written"),
    "eigh": Kind(lambda n: 9.0 * n**3, lambda n: 3 * n**2, "width; as pared.lowrank.eigen does it"),
    "plain eigh": Kind(lambda n: 9.0 * n**3, lambda n: 3 * n**2, "width; torch.linalg.eigh"),
    "eigenvalues": Kind(lambda n: 4 / 3 * n**3, lambda n: 2 * n**2, "width; torch.linalg.eigvalsh"),
    "cholesky": Kind(lambda n: n**3 / 3, lambda n: 2 * n**2, "width"),
    "channels": Kind(
        lambda o, n, k: 4 / 3 * n**3 + 2.0 * o * n**2 + _removed(o, n) - _removed(o, min(k, n)),
        lambda o, n, k: 8 * n**2 + 3 * o * n + (_removed(o, n) - _removed(o, min(k, n))) / 5,
        "outputs, channels, those that are known to stay; as pared.widths puts them in order",
    ),
    "triangular": Kind(lambda n, m: float(n) ** 2 * m, lambda n, m: n**2 + 2 * n * m, "width, right-hand sides"),
    "solve": Kind(lambda n, m: 2 / 3 * n**3 + 2.0 * n**2 * m, lambda n, m: 2 * n**2 + 2 * n * m, "width, sides"),
    "pivot": Kind(
        lambda k, n, m: 6.0 * n * k**2 + 2.0 * k**3 + 4.0 * m * k * (n - k), lambda k, n, m: 30 * k * n + m * n,
        "rank, inputs, outputs; the number of swaps depends on the numbers",
    ),
    "gram": Kind(lambda t, n: float(t) * n * n, lambda t, n: t * n + 2 * n**2, "tokens, features of one update"),
    "cross": Kind(lambda t, n: 2.0 * t * n * n, lambda t, n: 2 * t * n + 4 * n**2, "tokens, features of one update"),
    "energy": Kind(_none, lambda t, n: 2 * t * n, "tokens, features of one update"),
    "fisher": Kind(
        lambda e, t, n, o: 2.0 * e * t * n * o, lambda e, _, n, o: 3 * e * n * o, "examples, tokens, inputs, outputs"
    ),
    "mirror": Kind(_none, lambda n: 3 * n**2, "features of a Gram that is held by its upper half"),
    "select": Kind(_none, lambda rows, rivals: 6 * rows * rivals, "groups of scores, rivals in each"),
    "pack": Kind(_none, lambda o, n: 6 * o * n, "outputs, inputs of a sparse layer"),
    "sweep": Kind(
        lambda o, n, b: 2.0 * o * n * b + 1.0 * o * n * n, lambda o, n, b: o * n * b + 2 * o * n * math.ceil(n / b),
        "outputs, inputs, block of SparseGPT",
    ),
    "read": Kind(_none, _identity, "bytes from the disk"),
    "write": Kind(_none, _identity, "bytes to the disk"),
}  # fmt: skip


def product(m: int, k: int, n: int, dtype: str = "float64") -> Operation:
    """Return a product of matrices ``(m, k)`` and ``(k, n)``."""
    return Operation("product", (m, k, n), dtype)
