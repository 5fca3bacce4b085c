"""Which budget meets a target: the largest that is small or fast enough, or the smallest that is good enough."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from pared.allocation.curves import Scale
from pared.engine.allocate import Allocated
from pared.engine.explore import Curve
from pared.errors import ParedError
from pared.memory import format_size
from pared.names import called
from pared.schema.explore import ExploreConfig, Point

STEPS = 10  # of a bisection: budgets are found to a thousandth
TRIES = 4  # budgets that are measured until one is good enough


@dataclass(frozen=True)
class Picked:
    """A budget that meets a target.

    Attributes:
        structure: of it.
        keep: the fraction of the target parameters.
        found: what was decided at it.
        loss: that is expected, nats a token.
        measured: loss, where it was measured.
    """

    structure: str
    keep: float
    found: Allocated
    loss: float
    measured: float | None = None


class Picker:
    """Looks for budgets along curves.

    Args:
        curves: of every structure.
        scales: what is measured of a predicted loss, by structure.
        least: the smallest budget that is looked at.
        point: what a budget comes to.
        measure: returns the loss that is measured of a structure's budget, nats a token; none predicts alone.
    """

    def __init__(
        self,
        curves: Mapping[str, Curve],
        scales: Mapping[str, Scale],
        least: float,
        point: Callable[[str, float, Allocated], Point],
        measure: Callable[[str, Allocated], float] | None = None,
    ) -> None:
        self._curves, self._scales, self._least, self._point, self._measure = curves, scales, least, point, measure

    def pick(self, config: ExploreConfig) -> Picked | None:
        """Return the budget that meets a target, the best of all structures; None where there is no target.

        Raises:
            ParedError: no structure meets it.
        """
        if config.max_perplexity_ratio is not None:
            return self._good_enough(config.max_perplexity_ratio)
        if config.bytes is not None:
            most, told = config.bytes, called("target_bytes", str(config.target_bytes))
            return self._of_size(lambda point: point.bytes_on_disk <= most, told)
        if config.target_speed is not None:
            speed = config.target_speed
            return self._of_size(lambda point: point.speed >= speed, called("target_speed", f"{speed:g}"))
        return None

    def _of_size(self, meets: Callable[[Point], bool], told: str) -> Picked:
        """Return the largest budget that meets a target on its size, of the structure that loses least at it.

        Raises:
            ParedError: none does; names the smallest.
        """
        found = [picked for name in self._curves if (picked := self._largest(name, meets)) is not None]
        if not found:
            smallest = [self._point(name, keep, one) for name in self._curves
                        for keep, one in [self._smallest(name)] if one is not None]  # fmt: skip
            nearest = min(smallest, key=lambda point: point.bytes_on_disk)
            raise ParedError(
                f"{told} is out of reach: at keep {nearest.keep:.3g} the smallest has "
                f"{format_size(nearest.bytes_on_disk)} and ideal speed x{nearest.speed:.2f}; explore smaller budgets "
                f"({called('keep')}), or ask for less"
            )
        best = min(found, key=lambda one: one.loss)
        if self._measure is None:
            return best
        return Picked(best.structure, best.keep, best.found, best.loss, self._measure(best.structure, best.found))

    def _decide(self, name: str, keep: float) -> Allocated | None:
        try:
            return self._curves[name].decide(keep)
        except ParedError:
            return None

    def _smallest(self, name: str) -> tuple[float, Allocated | None]:
        """Return the smallest budget of a structure that can be met, from the least that is looked at."""
        keep = self._least
        while keep < 1 and (found := self._decide(name, keep)) is None:
            keep += 0.05
        return keep, found if keep < 1 else None

    def _largest(self, name: str, meets: Callable[[Point], bool]) -> Picked | None:
        low, best = self._smallest(name)
        if best is None or not meets(self._point(name, low, best)):
            return None
        high = 1.0
        for _ in range(STEPS):
            middle = (low + high) / 2
            found = self._decide(name, middle)
            if found is not None and meets(self._point(name, middle, found)):
                low, best = middle, found
            else:
                high = middle
        return Picked(name, low, best, self._scales[name](best.loss))

    def _good_enough(self, ratio: float) -> Picked:
        """Return the smallest model whose loss is at most that of a ratio of perplexities.

        What is measured of a budget that is picked tells more of the next, until one is good enough.

        Raises:
            ParedError: none is.
        """
        most, known = math.log(ratio), {name: list(scale.points) for name, scale in self._scales.items()}
        for _ in range(TRIES):
            scales = {name: Scale(points) for name, points in known.items()}
            found = [one for name in self._curves if (one := self._least_below(name, most, scales[name])) is not None]
            if not found:
                break
            best = min(found, key=lambda one: one.found.plan.after.bytes_on_disk)
            if self._measure is None:
                return best
            measured = self._measure(best.structure, best.found)
            if measured <= most:
                return Picked(best.structure, best.keep, best.found, best.loss, measured)
            known[best.structure].append((best.found.loss, measured))
        raise ParedError(f"{called('max_perplexity_ratio', f'{ratio:g}')}: no budget was found that is as good; "
                         "allow more, or calibrate on more text")  # fmt: skip

    def _least_below(self, name: str, most: float, scale: Scale) -> Picked | None:
        """Return the smallest budget whose expected loss is small enough."""
        low, high, best = self._least, 1.0, None
        found = self._decide(name, low)
        if found is not None and scale(found.loss) <= most:
            return Picked(name, low, found, scale(found.loss))
        for _ in range(STEPS):
            middle = (low + high) / 2
            found = self._decide(name, middle)
            if found is not None and scale(found.loss) <= most:
                high, best = middle, Picked(name, middle, found, scale(found.loss))
            else:
                low = middle
        return best
