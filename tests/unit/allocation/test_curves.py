"""Where a curve bends, and what measured points say of predicted ones."""

import pytest

from pared.allocation.curves import Scale, knee


def test_the_knee_of_two_straight_pieces_is_where_they_meet() -> None:
    sizes = [1.0, 0.9, 0.8, 0.7, 0.6, 0.5]
    losses = [0.0, 0.1, 0.2, 0.3, 1.3, 2.3]
    assert knee(sizes, losses) == 3
    assert knee(sizes[::-1], losses[::-1]) == 2, "whatever the order"


def test_the_knee_does_not_depend_on_units() -> None:
    sizes, losses = [1.0, 0.8, 0.6, 0.4], [0.0, 0.1, 0.4, 2.0]
    assert knee([1e9 * size for size in sizes], [3 * loss for loss in losses]) == knee(sizes, losses)


@pytest.mark.parametrize("losses", [[0.0, 0.5, 1.0], [0.0, 0.9, 1.0], [0.0, 0.0, 0.0]])
def test_a_curve_that_is_nowhere_below_the_line_has_no_knee(losses: list[float]) -> None:
    assert knee([1.0, 0.5, 0.0], losses) is None


def test_too_few_points_have_no_knee() -> None:
    assert knee([], []) is None
    assert knee([1.0, 0.5], [0.0, 1.0]) is None


def test_a_scale_goes_through_its_points_and_on_from_the_last_two() -> None:
    scale = Scale([(2.0, 6.0), (1.0, 2.0)])
    assert [scale(x) for x in (0.0, 0.5, 1.0, 1.5, 2.0, 3.0)] == [0.0, 1.0, 2.0, 4.0, 6.0, 10.0]


def test_a_scale_never_falls_and_without_points_changes_nothing() -> None:
    falling = Scale([(1.0, 3.0), (2.0, 1.0)])
    assert [falling(x) for x in (1.0, 1.5, 2.0, 9.0)] == [3.0] * 4
    assert Scale()(0.7) == 0.7
