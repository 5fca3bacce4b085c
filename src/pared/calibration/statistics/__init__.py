"""Statistics of what happens at a site, forward and backward: one protocol, one registry."""

from pared.calibration.statistics.accumulators import (
    Shapes,
    accumulators,
    expert_accumulators,
    gradient_accumulators,
)
from pared.calibration.statistics.base import Of, Statistic, StatisticView
from pared.calibration.statistics.distributed import all_reduce
from pared.calibration.statistics.features import Energy, Magnitude, Mean, Variance
from pared.calibration.statistics.gradients import Fisher, OutputGradient, WeightGradient
from pared.calibration.statistics.gram import CROSS, Cross, Gram, MeanGram, cross_of
from pared.calibration.statistics.registry import (
    STATISTICS,
    StatisticKind,
    backward_data_fraction,
    per_token,
    require_statistics,
    statistic_kind,
)

__all__ = [
    "CROSS",
    "STATISTICS",
    "Cross",
    "Energy",
    "Fisher",
    "Gram",
    "Magnitude",
    "Mean",
    "MeanGram",
    "Of",
    "OutputGradient",
    "Shapes",
    "Statistic",
    "StatisticKind",
    "StatisticView",
    "Variance",
    "WeightGradient",
    "accumulators",
    "all_reduce",
    "backward_data_fraction",
    "cross_of",
    "expert_accumulators",
    "gradient_accumulators",
    "per_token",
    "require_statistics",
    "statistic_kind",
]
