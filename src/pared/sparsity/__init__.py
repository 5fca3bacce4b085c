"""The mathematics of one-shot pruning: tensors in, tensors out."""

from typing import TYPE_CHECKING

from pared.lazy import lazy_package

if TYPE_CHECKING:
    from pared.sparsity.masks import Pruned
    from pared.sparsity.pattern import NM, Pattern, Unstructured, parse
    from pared.sparsity.registry import METHODS, PruningMethod

__all__ = ["METHODS", "NM", "Pattern", "Pruned", "PruningMethod", "Unstructured", "parse"]

lazy_package(
    __name__,
    {
        "pared.sparsity.masks": ["Pruned"],
        "pared.sparsity.registry": ["METHODS", "PruningMethod"],
        "pared.sparsity.pattern": ["NM", "Pattern", "Unstructured", "parse"],
    },
)
