"""The mathematics of low rank: tensors in, tensors out."""

from pared.lowrank.decomposition import Decomposition, Factors
from pared.lowrank.methods import METHODS, LowRankMethod

__all__ = ["METHODS", "Decomposition", "Factors", "LowRankMethod"]
