"""What the data says about the weights: one pass over the blocks, statistics as small accumulators."""

from pared.calibration.activations import BlockInputs, capture
from pared.calibration.backward import backward
from pared.calibration.cache import save_blocks, saved_blocks
from pared.calibration.forward import DensePath, Shapes, WalkedBlock, walk
from pared.calibration.gradient_statistics import FORWARD as STATISTICS
from pared.calibration.gradient_statistics import GRADIENT_STATISTICS, GradientStatistic, OfInput, share_felt
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
    "Collected",
    "DensePath",
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
    "WalkedBlock",
    "accumulators",
    "all_reduce",
    "backward",
    "backward_data_fraction",
    "capture",
    "choose_dtype",
    "choose_labels",
    "cross_of",
    "gradient_accumulators",
    "per_token",
    "require_statistics",
    "save_blocks",
    "saved_blocks",
    "share_felt",
    "statistic_kind",
    "walk",
]
