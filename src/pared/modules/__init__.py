"""What stands where a linear layer stood."""

from pared.modules.low_rank import LowRankLinear
from pared.modules.narrow import NarrowConv1D, NarrowLinear
from pared.modules.pivoted import PivotedLinear
from pared.modules.quantized import QuantizedLinear, bits_of
from pared.modules.replace import inherit_requires_grad, replace_module, replace_parameter
from pared.modules.shared import BasisHolder, share
from pared.modules.sparse import NMGroups, SparseLinear

# What pared puts in the place of linear layers.
Changed = LowRankLinear | PivotedLinear | SparseLinear | NarrowLinear | NarrowConv1D | QuantizedLinear

__all__ = [
    "BasisHolder",
    "Changed",
    "LowRankLinear",
    "NMGroups",
    "NarrowConv1D",
    "NarrowLinear",
    "PivotedLinear",
    "QuantizedLinear",
    "SparseLinear",
    "bits_of",
    "inherit_requires_grad",
    "replace_module",
    "replace_parameter",
    "share",
]
