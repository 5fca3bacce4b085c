"""From what was collected of a site to what a method reads: second moments per token, shrunk as its options say."""

from collections.abc import Mapping
from typing import NamedTuple

import torch

from pared.calibration import CROSS, StatisticView, cross_of, per_token
from pared.engine.spec import LowRankSpec
from pared.lowrank.dense_path import target
from pared.lowrank.shrinkage import chosen, shrunk

StatisticsOfSite = Mapping[str, StatisticView]


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


class Target(NamedTuple):
    """What is to be compressed of a layer.

    Attributes:
        W_ON: the weight ``(out, in)``; None for its own.
        lacking: whether the dense model has no targets, as it sends the layer other tokens than the compressed one.
    """

    W_ON: torch.Tensor | None
    lacking: bool = False


def dense_target(spec: LowRankSpec, W_ON: torch.Tensor, own: StatisticsOfSite) -> Target:
    """Return the weight whose outputs behind the compressed prefix come closest to those of the dense model.

    Args:
        spec: whose share of the dense path it is.
        W_ON: the dense weight.
        own: statistics of the layer, with those of both paths where the dense model ran alongside.
    """
    name = spec.method.input_gram
    cross = cross_of(own, name)
    if cross is None:
        return Target(None, lacking=CROSS in own)
    gram_NN = per_token(name, own[name])  # of the tokens that reached it, as the cross Gram is
    return Target(target(W_ON.to(gram_NN.device), gram_NN, cross.value, spec.dense_path))
