"""When Basel prunes, how much at a time, and how fast it learns meanwhile."""

import math


def prune_steps(steps: int, first: int, times: int) -> tuple[int, ...]:
    """Return the optimiser steps before which bases are dropped: exactly as many as asked, evenly spaced.

    The released code prunes too often where steps do not divide, and fails with fewer steps than times. Here the j-th
    of N is before step ``first + ⌊j · (steps - first) / N⌋``; several may fall together where steps are fewer than N.

    Args:
        steps: of keeping and pruning phase together.
        first: the step the pruning phase begins with, counted from 0.
        times: N.

    Raises:
        ValueError: no steps are left to prune in.
    """
    span = steps - first
    if span < 1 or times < 1:
        raise ValueError(f"{times} prunes in {span} steps: expected at least one of each; train on more tokens")
    return tuple(first + index * span // times for index in range(times))


def mass_after(keep_ratio: float, done: int, times: int) -> float:
    """Return the share of a weight's mass that is left after so many of N prunes, ``K^(done/N)``."""
    return keep_ratio ** (done / times)


def falling(dense: int, keep: float, times: int) -> tuple[int, ...]:
    """Return the numbers that are left after each of N prunes, falling geometrically to ``keep · dense``."""
    return tuple(math.floor(dense * keep ** ((index + 1) / times)) for index in range(times))


def rate_factor(keep_ratio: float, keeping: float, pruning: float) -> float:
    """Return Basel's factor F of the learning rate while bases are dropped: the mean of 1/√(what is left).

    What is left stays 1 in the keeping phase and falls to K geometrically in the pruning phase, of which the mean is
    ``(1/√K - 1) / ln(1/K) · 2``. With one epoch of keeping this is the paper's formula.

    Args:
        keep_ratio: K.
        keeping: epochs, or any measure, of the keeping phase.
        pruning: of the pruning phase, in the same measure.
    """
    if keep_ratio >= 1:
        return 1.0
    falling = (keep_ratio**-0.5 - 1) / math.log(1 / keep_ratio) * 2
    return (falling * pruning + keeping) / (keeping + pruning)
