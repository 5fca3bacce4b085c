"""What the data says about the weights: one pass over the blocks, statistics as small accumulators."""

from pared.calibration.activations import BlockInputs, capture
from pared.calibration.backward import Trail, Wants, back, from_head, frozen, record
from pared.calibration.cache import save_block, saved_blocks
from pared.calibration.forward import BlockStatistics, DenseReference, observe, propagate, propagate_reference
from pared.calibration.labels import Given, Labels, NextToken, Sampled, Scores, choose_labels
from pared.calibration.statistics import (
    CROSS,
    STATISTICS,
    Fisher,
    Gram,
    MeanGram,
    OutputGradient,
    Shapes,
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
from pared.environment import choose_dtype

__all__ = [
    "CROSS",
    "STATISTICS",
    "BlockInputs",
    "BlockStatistics",
    "DenseReference",
    "Fisher",
    "Given",
    "Gram",
    "Labels",
    "MeanGram",
    "NextToken",
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
