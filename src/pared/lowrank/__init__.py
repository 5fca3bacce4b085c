"""The mathematics of low rank: tensors in, tensors out."""

from typing import TYPE_CHECKING

from pared.lazy import lazy_package

if TYPE_CHECKING:
    from pared.lowrank.decomposition import Decomposition, Factors
    from pared.lowrank.registry import METHODS, DrawnOptions, GradientOptions, LowRankMethod, SharingOptions

__all__ = ["METHODS", "Decomposition", "DrawnOptions", "Factors", "GradientOptions", "LowRankMethod", "SharingOptions"]

lazy_package(
    __name__,
    {
        "pared.lowrank.decomposition": ["Decomposition", "Factors"],
        "pared.lowrank.registry": ["METHODS", "DrawnOptions", "GradientOptions", "LowRankMethod", "SharingOptions"],
    },
)
