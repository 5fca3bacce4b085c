"""What stands where a linear layer stood."""

from pared.modules.low_rank import LowRankLinear
from pared.modules.pivoted import PivotedLinear
from pared.modules.replace import replace_module
from pared.modules.shared import BasisHolder, share
from pared.modules.sparse import NMGroups, SparseLinear

__all__ = ["BasisHolder", "LowRankLinear", "NMGroups", "PivotedLinear", "SparseLinear", "replace_module", "share"]
