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

    def slowdown(self) -> float | None:
        """Return how much longer two threads take for two pieces of work than each alone; None if never at once.

        From 1, where they are not in each other's way, to 2, where nothing is gained.
        """
        ...

    def compute_dtype(self, asked: str, model_dtype: str) -> str:
        """Return what blocks compute in there, where ``auto`` is asked for."""
        ...


def total(rates: Rates, operations: Iterable[Operation]) -> float:
    """Return the seconds that operations take one after the other."""
    return sum(rates.seconds(operation) for operation in operations)


def beside(runs: float, solves: float, slowdown: float) -> tuple[float, float]:
    """Return the seconds that blocks run, and those that solving is waited for, where both are done at once.

    Both are slower until the shorter is done.

    Args:
        runs: seconds that blocks run, alone.
        solves: seconds that they are solved, alone.
        slowdown: of both, see :meth:`Rates.slowdown`.
    """
    shorter = min(runs, solves)
    whole = slowdown * shorter + max(runs, solves) - shorter
    return (whole, 0.0) if runs >= solves else (slowdown * runs, whole - slowdown * runs)
