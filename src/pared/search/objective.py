"""What a candidate is worth: the model with its allocation in place, and its perplexity on the search split."""

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Protocol

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pared.allocation.dsa import Program
from pared.data.windows import Windows, digest_of
from pared.errors import ParedError
from pared.evaluation import perplexity
from pared.search.evolution import Allocation, Candidate, Measured

FIRST = 4  # the first step of successive halving has this fraction of the windows, the next twice as many


class Trial(Protocol):
    """A model that can be given any allocation and be put back.

    Attributes:
        model: as it is outside of ``installed``: dense, bit for bit.
    """

    model: PreTrainedModel

    def allocate(self, program: Program) -> Allocation | None:
        """Return what a program makes of every site; None if it is rejected."""

    def uniform(self) -> Allocation:
        """Return the allocation that treats all alike, to compare with."""

    def shares(self, program: Program) -> dict[str, float]:
        """Return what a valid program takes from every block, by its number, for the record."""

    def installed(self, allocation: Allocation) -> AbstractContextManager[None]:
        """Have an allocation in the model for the length of a ``with`` block."""


@dataclass
class Measure:
    """Measures candidates; what a worker is sent.

    Attributes:
        trial: the model.
        tokenizer: of the model.
        steps: windows of the search split, each step those that come on top of the one before.
        full: all windows of the search split.
    """

    trial: Trial
    tokenizer: PreTrainedTokenizerBase
    steps: Sequence[Windows]
    full: Windows

    def __call__(self, candidate: Candidate) -> Measured:
        """Measure a candidate step by step, as long as it stays within its limits."""
        with self.trial.installed(candidate.allocation):
            return self.evaluate_current(self.steps, candidate.limits)

    def final(self, candidate: Candidate) -> Measured:
        """Measure a candidate on the full split."""
        with self.trial.installed(candidate.allocation):
            return self.evaluate_current([self.full])

    def evaluate_current(
        self, steps: Sequence[Windows], limits: Sequence[float] = (), on_window: Callable[[], None] = lambda: None
    ) -> Measured:
        """Measure the model that stands there; ``on_window`` is called after every window."""
        nats, predicted, values = 0.0, 0, list[float]()
        for windows, limit in zip(steps, (*limits, math.inf), strict=False):
            try:
                found = perplexity(self.trial.model, self.tokenizer, windows, on_window=on_window)
            except ParedError as error:  # a loss that is not a number: so bad a candidate that its logits overflow
                return Measured((*values, *(math.inf,) * (len(steps) - len(values))), str(error))
            nats, predicted = nats + found.nats, predicted + found.predicted
            mean = nats / predicted
            values.append(math.exp(mean) if mean < 700 else math.inf)
            if values[-1] > limit:
                break
        return Measured(tuple(values))


def successive_halving_splits(windows: Windows, halving: bool) -> list[Windows]:
    """Return the windows of the steps of a measurement: a quarter, as many again, the other half; or all at once.

    Raises:
        ParedError: there are too few windows for steps.
    """
    count = len(windows.tokens)
    if not halving:
        return [windows]
    if count < FIRST:
        raise ParedError(f"successive halving needs at least {FIRST} windows, got {count}; take more, or search "
                         "without halving")  # fmt: skip
    edges = [0, count // FIRST, 2 * count // FIRST, count]
    return [first(windows, stop, start) for start, stop in pairwise(edges)]


def first(windows: Windows, stop: int, start: int = 0) -> Windows:
    """Return some of the windows of a text."""
    tokens = windows.tokens[start:stop]
    return replace(windows, tokens=tokens, digest=digest_of(tokens), spans=windows.spans[start:stop])
