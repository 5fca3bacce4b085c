"""What gives operations a time: this machine by measuring it, or another by published figures."""

from collections.abc import Iterable
from typing import Protocol

from pared.operations import Operation


class Rates(Protocol):
    """Gives operations a time."""

    @property
    def machine(self) -> str:
        """What it is of, in words."""
        ...

    @property
    def computed(self) -> bool:
        """Whether it is from published figures, and not measured."""
        ...

    def seconds(self, operation: Operation) -> float:
        """Return the seconds that an operation takes, as often as it happens."""
        ...

    def compute_dtype(self, asked: str, model_dtype: str) -> str:
        """Return what blocks compute in there, where ``auto`` is asked for."""
        ...


def total(rates: Rates, operations: Iterable[Operation]) -> float:
    """Return the seconds that operations take one after the other."""
    return sum(rates.seconds(operation) for operation in operations)
