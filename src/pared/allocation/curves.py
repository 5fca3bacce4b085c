"""Curves of loss over size: where they bend, and what one that is measured says of one that is predicted."""

from collections.abc import Iterable, Sequence
from itertools import pairwise


def knee(sizes: Sequence[float], losses: Sequence[float]) -> int | None:
    """Return the point at which a curve bends most: the one farthest below the straight line between its ends.

    Both axes are scaled to 0 to 1 first (Kneedle, Satopää et al., 2011), so that units do not matter; the ends do.

    Args:
        sizes: of the points, in any order.
        losses: of the points, in the same order.

    Returns:
        The index of the point; None with fewer than three sizes, or of a curve that is nowhere below the line.
    """
    least, most = min(sizes, default=0.0), max(sizes, default=0.0)
    low, high = min(losses, default=0.0), max(losses, default=0.0)
    if len(set(sizes)) < 3 or high <= low:
        return None
    below = [(most - size) / (most - least) - (loss - low) / (high - low)
             for size, loss in zip(sizes, losses, strict=True)]  # fmt: skip
    best = max(range(len(below)), key=below.__getitem__)
    return best if below[best] > 1e-9 else None


class Scale:
    """What is measured of a predicted loss: straight between the points that were, and on from the last two.

    Never falling, and 0 of 0. Without a point a prediction is taken as it is.

    Args:
        points: pairs of predicted and measured, in any order.

    Attributes:
        points: the same, by what is predicted.
    """

    def __init__(self, points: Iterable[tuple[float, float]] = ()) -> None:
        self.points, self._points = sorted(points), [(0.0, 0.0)]
        for predicted, measured in self.points:
            if predicted > self._points[-1][0]:
                self._points.append((predicted, max(measured, self._points[-1][1])))

    def __call__(self, predicted: float) -> float:
        """Return the loss that is expected to be measured of one that is predicted."""
        if len(self._points) == 1:
            return predicted
        pairs = list(pairwise(self._points))
        (x0, y0), (x1, y1) = next((pair for pair in pairs if predicted <= pair[1][0]), pairs[-1])
        return y0 + (predicted - x0) * (y1 - y0) / (x1 - x0)
