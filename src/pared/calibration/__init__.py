"""What the data says about the weights: one pass over the blocks, statistics as small accumulators."""

from pared.calibration.capture import BlockInputs, capture
from pared.calibration.precision import choose_dtype
from pared.calibration.statistics import STATISTICS, Gram, Statistic
from pared.calibration.walk import WalkedBlock, walk

__all__ = [
    "STATISTICS",
    "BlockInputs",
    "Gram",
    "Statistic",
    "WalkedBlock",
    "capture",
    "choose_dtype",
    "walk",
]
