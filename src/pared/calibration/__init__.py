"""What the data says about the weights: one pass over the blocks, statistics as small accumulators."""

from pared.calibration.activations import BlockInputs, capture
from pared.calibration.backward import Trail, Wants, back, from_head, frozen, record
from pared.calibration.cache import save_block, saved_blocks
from pared.calibration.forward import BlockStatistics, DenseReference, Shapes, observe, propagate, propagate_reference
from pared.calibration.gradient_statistics import FORWARD as STATISTICS
from pared.calibration.gradient_statistics import GRADIENT_STATISTICS, GradientStatistic, OfInput
from pared.calibration.labels import Given, Labels, NextToken, Sampled, Scores, choose_labels
from pared.calibration.statistics import (
    CROSS,
    Fisher,
    Gram,
    MeanGram,
    OutputGradient,
    Statistic,
    StatisticView,
    accumulators,
    all_reduce,
    backward_data_fraction,
    cross_of,
    gradient_accumulators,
    per_token,
    require_statistics,
    statistic_kind,
)
from pared.calibration.statistics import StatisticView as Collected
from pared.environment import choose_dtype

__all__ = [
    "CROSS",
    "GRADIENT_STATISTICS",
    "STATISTICS",
    "BlockInputs",
    "BlockStatistics",
    "Collected",
    "DenseReference",
    "Fisher",
    "Given",
    "GradientStatistic",
    "Gram",
    "Labels",
    "MeanGram",
    "NextToken",
    "OfInput",
    "OutputGradient",
    "Sampled",
    "Scores",
    "Shapes",
    "Statistic",
    "StatisticView",
    "Trail",
    "Wants",
    "accumulators",
    "all_reduce",
    "back",
    "backward_data_fraction",
    "capture",
    "choose_dtype",
    "choose_labels",
    "cross_of",
    "from_head",
    "frozen",
    "gradient_accumulators",
    "observe",
    "per_token",
    "propagate",
    "propagate_reference",
    "record",
    "require_statistics",
    "save_block",
    "saved_blocks",
    "statistic_kind",
]
