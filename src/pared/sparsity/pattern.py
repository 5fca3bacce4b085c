"""Which zeros a sparse weight may have: anywhere, or so many in every few inputs.

``N:M`` has one meaning here, that of the hardware: of every M consecutive inputs of an output N are kept. (Wanda's
code counts the zeros; 2:4 and 4:8 are the same either way.)
"""

import math
from dataclasses import dataclass

SLACK = 1e-12  # 1 - 0.9 is a hair below 0.1, and still means 1 of 10


@dataclass(frozen=True)
class Unstructured:
    """Zeros anywhere.

    Attributes:
        sparsity: the fraction of zeros, at least 0 and below 1.
    """

    sparsity: float

    def __post_init__(self) -> None:
        if not 0 <= self.sparsity < 1:
            raise ValueError(f"sparsity {self.sparsity}: expected a fraction of zeros, at least 0 and below 1")

    def __str__(self) -> str:
        return f"{self.sparsity:g}"

    def zeros(self, count: int) -> int:
        """Return how many of ``count`` weights go: ``⌊count · sparsity⌋``, floating-point rounding aside."""
        return math.floor(count * (self.sparsity + SLACK))

    def check(self, in_features: int) -> None:
        """Accept any number of inputs."""


@dataclass(frozen=True)
class NM:
    """At most N weights that are not zero in every aligned group of M consecutive inputs of one output.

    Attributes:
        kept: N, the weights of a group that are kept.
        group: M, the weights of a group.
    """

    kept: int
    group: int

    def __post_init__(self) -> None:
        if not 0 < self.kept <= self.group:
            raise ValueError(f"pattern {self.kept}:{self.group}: expected N:M with at least 1 and at most M of M kept")

    def __str__(self) -> str:
        return f"{self.kept}:{self.group}"

    @property
    def sparsity(self) -> float:
        """The fraction of zeros."""
        return 1 - self.kept / self.group

    def check(self, in_features: int) -> None:
        """Refuse a number of inputs that groups do not fill.

        Raises:
            ValueError: names the pattern and the inputs.
        """
        if in_features % self.group:
            raise ValueError(f"pattern {self} on {in_features} inputs: expected a multiple of {self.group}")


Pattern = Unstructured | NM


def parse(text: str) -> Pattern:
    """Read a pattern: ``"2:4"`` keeps 2 of every 4, ``"0.5"`` makes half of the weights zero.

    Raises:
        ValueError: it is neither, or out of range.
    """
    kept, colon, group = text.strip().partition(":")
    try:
        numbers = (int(kept), int(group)) if colon else (float(kept),)
    except ValueError:
        raise ValueError(f"pattern {text!r}: expected N:M such as 2:4, or a sparsity such as 0.5") from None
    return NM(*numbers) if colon else Unstructured(*numbers)
