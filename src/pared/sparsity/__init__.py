"""The mathematics of one-shot pruning: tensors in, tensors out."""

from typing import TYPE_CHECKING

from pared.lazy import lazy_package

if TYPE_CHECKING:
    from pared.sparsity.masks import Pruned
    from pared.sparsity.pattern import NM, Pattern, Unstructured, parse
    from pared.sparsity.registry import METHODS, PruningMethod
    from pared.sparsity.solution import OrderedWeights, PruningSolution, RankedWeights

__all__ = [
    "METHODS",
    "NM",
    "OrderedWeights",
    "Pattern",
    "Pruned",
    "PruningMethod",
    "PruningSolution",
    "RankedWeights",
    "Unstructured",
    "parse",
]

lazy_package(
    __name__,
    {
        "pared.sparsity.masks": ["Pruned"],
        "pared.sparsity.pattern": ["NM", "Pattern", "Unstructured", "parse"],
        "pared.sparsity.registry": ["METHODS", "PruningMethod"],
        "pared.sparsity.solution": ["OrderedWeights", "PruningSolution", "RankedWeights"],
    },
)
