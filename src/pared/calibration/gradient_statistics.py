"""Names from before there was one protocol; gone as soon as nothing imports them."""

from collections.abc import Callable

import torch

from pared.calibration.statistics import STATISTICS, Statistic, StatisticKind

GradientStatistic = Statistic
FORWARD = {name: kind for name, kind in STATISTICS.items() if kind.of in ("input", "output")}


class _IsOfInput(type):
    def __instancecheck__(cls, instance: object) -> bool:
        return getattr(instance, "of", None) == "input"


class OfInput(metaclass=_IsOfInput):
    """Every statistic of inputs."""


def _maker(kind: StatisticKind) -> Callable[[int, int, torch.device], Statistic]:
    return lambda out_features, in_features, device: kind.accumulator(kind.features(out_features, in_features), device)


GRADIENT_STATISTICS = {
    name: _maker(kind) for name, kind in STATISTICS.items() if kind.of not in ("output", "input_pair")
}
