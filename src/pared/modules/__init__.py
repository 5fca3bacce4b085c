"""What stands where a linear layer stood."""

from pared.modules.low_rank import LowRankLinear
from pared.modules.pivoted import PivotedLinear
from pared.modules.replace import inherit_requires_grad, replace_module
from pared.modules.shared import BasisHolder, share
from pared.modules.sparse import NMGroups, SparseLinear

__all__ = [
    "BasisHolder",
    "LowRankLinear",
    "NMGroups",
    "PivotedLinear",
    "SparseLinear",
    "inherit_requires_grad",
    "replace_module",
    "share",
]
