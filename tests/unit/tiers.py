"""What of a table of cases runs in every test run, and what in the slow tier alone."""

import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import pytest


def crossed(*axes: Sequence[Any]) -> list[Any]:
    """Return every combination of some axes as parameters, slow but for the few that cover each value once.

    Args:
        axes: of values, in the order of the names that are parametrized.
    """
    longest = max(map(len, axes))
    quick = {tuple(place % len(axis) for axis in axes) for place in range(longest)}
    return [
        pytest.param(*(axis[place] for axis, place in zip(axes, places, strict=True)), marks=_mark(places in quick))
        for places in itertools.product(*(range(len(axis)) for axis in axes))
    ]


def quick_first(quick: Iterable[tuple[Any, ...]], every: Iterable[tuple[Any, ...]]) -> list[Any]:
    """Return the quick cases as they are, and all others as slow ones."""
    quick = sorted(set(quick))
    return [*quick, *(pytest.param(*one, marks=_mark(False)) for one in sorted(set(every) - set(quick)))]


def some(quick: Sequence[Any], every: Iterable[Any]) -> list[Any]:
    """Return every value as a parameter, slow but for the quick ones."""
    return [pytest.param(one, marks=_mark(one in quick)) for one in every]


def _mark(quick: bool) -> Sequence[pytest.MarkDecorator]:
    return () if quick else (pytest.mark.slow,)
