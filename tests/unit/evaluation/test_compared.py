"""Differences of two models are told with the luck in them."""

import math

import numpy as np
import pytest

from pared.evaluation.compared import mcnemar, paired_difference, perplexity_quotient


def test_mcnemar_is_the_sign_test_on_rows_that_differ() -> None:
    assert mcnemar(0, 0) == 1
    assert mcnemar(5, 0) == mcnemar(0, 5) == 2 / 32
    assert mcnemar(10, 2) == 2 * (1 + 12 + 66) / 2**12
    assert mcnemar(7, 7) == 1
    assert mcnemar(2_000, 1_000) < 1e-70


def test_the_interval_of_a_difference_is_that_of_its_standard_error() -> None:
    generator = np.random.default_rng(1)
    one, other = generator.integers(0, 2, 2_000).tolist(), generator.integers(0, 2, 2_000).tolist()
    found, values = paired_difference(one, other), np.subtract(one, other)
    assert found.value == pytest.approx(values.mean())
    assert found.high - found.low == pytest.approx(2 * 1.96 * values.std() / 2_000**0.5, rel=0.05)
    assert found.low < found.value < found.high
    assert (found.better, found.worse, found.p) == (
        (values > 0).sum(),
        (values < 0).sum(),
        mcnemar(found.better, found.worse),
    )
    swapped = paired_difference(other, one)
    assert (swapped.value, swapped.better, swapped.p) == (-found.value, found.worse, found.p)


def test_rows_that_both_do_alike_leave_no_luck() -> None:
    found = paired_difference([1, 0, 1], [1, 0, 1])
    assert (found.value, found.low, found.high, found.p) == (0, 0, 0, 1)
    assert paired_difference([0.5, 0.1], [0.4, 0.0]).p is None  # shares, not right or wrong


def test_windows_are_paired_so_that_hard_ones_do_not_count_as_luck() -> None:
    generator = np.random.default_rng(2)
    theirs = [(float(nats), 100) for nats in generator.uniform(50, 500, 60)]
    ours = [(nats + 10, tokens) for nats, tokens in theirs]
    found = perplexity_quotient(ours, theirs)
    assert found.value == pytest.approx(math.exp(0.1))
    assert (found.low, found.high) == pytest.approx((found.value, found.value))
    assert (found.better, found.worse) == (0, 60)
    noisy = [(nats + float(extra), 100) for (nats, _), extra in zip(theirs, generator.normal(0, 10, 60), strict=True)]
    apart = perplexity_quotient(noisy, theirs)
    assert apart.low < apart.value < apart.high
    assert math.log(apart.high / apart.low) == pytest.approx(2 * 1.96 * 0.1 / 60**0.5, rel=0.3)


def test_what_is_no_pair_is_refused() -> None:
    for one, other in (([], []), ([1.0], [1.0, 0.0])):
        with pytest.raises(ValueError, match="expected as many"):
            paired_difference(one, other)
    with pytest.raises(ValueError, match="other numbers of tokens"):
        perplexity_quotient([(1.0, 2)], [(1.0, 3)])
