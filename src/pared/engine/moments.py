"""From what was collected of a site to what a method reads: second moments per token, shrunk as its options say."""

from typing import NamedTuple

import torch

from pared.calibration import StatisticView, per_token
from pared.engine.spec import LowRankSpec
from pared.lowrank.shrinkage import chosen, shrunk


class Moments(NamedTuple):
    """A statistic as a method reads it: per token, and shrunk as its options say.

    Attributes:
        value: of the statistic.
        shrinkage: how far it was drawn towards equal energies, 0 for not at all.
    """

    value: torch.Tensor
    shrinkage: float


def moments(spec: LowRankSpec, name: str, collected: StatisticView, tokens: int = 0) -> Moments:
    """Return a statistic as the method of a spec reads it; everything that prices or decomposes takes it from here.

    Args:
        spec: whose options say how far it is shrunk.
        name: of the statistic.
        collected: what was seen of it.
        tokens: of the text, see :func:`~pared.calibration.per_token`.
    """
    asked = spec.shrinkage
    by_rule = getattr(collected, "shrinkage", 0.0) if asked.get(name) == "auto" else 0.0  # which may be on the disk
    amount = chosen(asked, name, by_rule)
    return Moments(shrunk(per_token(name, collected, tokens), amount), amount)
