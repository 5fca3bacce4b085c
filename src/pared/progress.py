"""Progress of the pipeline: stages with a length, and the time each took."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol


class Advance(Protocol):
    """Marks a step as done."""

    def __call__(self, told: str = "", recalled: bool = False) -> None:
        """Mark one.

        Args:
            told: is to be shown with it, if anything.
            recalled: it was done before a crash and is only counted: rates and the time left leave it out.
        """


class Progress(Protocol):
    """What receives the progress of stages."""

    def stage(self, name: str, total: int, unit: str) -> AbstractContextManager[Advance]:
        """Open a stage of ``total`` steps; the function it gives marks one of them as done."""

    def note(self, message: str) -> None:
        """Say something that a user should read once."""


class Silent:
    """Watches and says nothing."""

    @contextmanager
    def stage(self, name: str, total: int, unit: str) -> Iterator[Advance]:  # noqa: ARG002 - the protocol's
        """Open a stage."""
        yield lambda told="", recalled=False: None  # noqa: ARG005 - the protocol's

    def note(self, message: str) -> None:
        """Say nothing."""


class Pace:
    """How fast the steps of a stage go by, and how long the others will take; what was done before a crash aside.

    Args:
        total: steps of the stage.
        clock: returns seconds; the system's by default.

    Attributes:
        done: steps that are done, recalled ones among them.
    """

    def __init__(self, total: int, clock: Callable[[], float] | None = None) -> None:
        self.total, self.done = total, 0
        self._clock = clock or time.perf_counter
        self._begun, self._recalled = self._clock(), 0

    def step(self, recalled: bool = False) -> None:
        """Count a step."""
        self.done += 1
        if recalled:
            self._recalled += 1
            if self._recalled == self.done:  # work begins when the last of those that come first is read
                self._begun = self._clock()

    @property
    def rate(self) -> float | None:
        """Steps a second; None before the first is done."""
        seconds, steps = self._clock() - self._begun, self.done - self._recalled
        return steps / seconds if steps and seconds > 0 else None

    @property
    def left(self) -> float | None:
        """Seconds that the other steps will take at this rate; None before the first is done."""
        return None if self.rate is None else (self.total - self.done) / self.rate


class Stopwatch:
    """Seconds by stage, summed over visits; what happens in a stage inside another is counted in the inner one alone.

    They are those of the thread that made it, whose stages add up to the time that passes; stages of other threads,
    which work beside it, are not counted, but what it waits for them in is.

    Args:
        clock: returns seconds; the system's by default.
    """

    def __init__(self, clock: Callable[[], float] | None = None) -> None:
        self.seconds: dict[str, float] = {}
        self._clock = clock or time.perf_counter
        self._open: list[str] = []
        self._since = 0.0
        self._thread = threading.get_ident()

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        """Time what happens inside."""
        if threading.get_ident() != self._thread:
            yield
            return
        self._count()
        self._open.append(stage)
        try:
            yield
        finally:
            self._count()
            self._open.pop()

    def so_far(self) -> dict[str, float]:
        """Return the seconds by stage, with those of the stage that is open."""
        found = dict(self.seconds)
        if self._open:
            stage = self._open[-1]
            found[stage] = found.get(stage, 0.0) + self._clock() - self._since
        return found

    def _count(self) -> None:
        """Give the time since the last change of stage to the stage that was open."""
        now = self._clock()
        if self._open:
            stage = self._open[-1]
            self.seconds[stage] = self.seconds.get(stage, 0.0) + now - self._since
        self._since = now
