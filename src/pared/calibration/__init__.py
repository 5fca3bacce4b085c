"""What the data says about the weights: one pass over the blocks, statistics as small accumulators."""

from pared.calibration.activations import BlockInputs, capture
from pared.calibration.backward import backward
from pared.calibration.cache import save_blocks, saved_blocks
from pared.calibration.forward import DensePath, Shapes, WalkedBlock, walk
from pared.calibration.gradient_statistics import (
    GRADIENT_STATISTICS,
    Fisher,
    GradientStatistic,
    OfInput,
    OutputGradient,
    gradient_accumulators,
    share_felt,
)
from pared.calibration.labels import Given, Labels, NextToken, Sampled, Scores, choose_labels
from pared.calibration.statistics import (
    CROSS,
    STATISTICS,
    Collected,
    Gram,
    MeanGram,
    Statistic,
    cross_of,
    per_token,
    require_statistics,
)
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
    "WalkedBlock",
    "backward",
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
    "walk",
]
