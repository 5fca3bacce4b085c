"""The mathematics of one-shot pruning: tensors in, tensors out."""

from typing import TYPE_CHECKING

from pared.lazy import lazy_package

if TYPE_CHECKING:
    from pared.sparsity.masks import Pruned
    from pared.sparsity.methods import METHODS, PruningMethod
    from pared.sparsity.pattern import NM, Pattern, Unstructured, parse

__all__ = ["METHODS", "NM", "Pattern", "Pruned", "PruningMethod", "Unstructured", "parse"]

lazy_package(
    __name__,
    {
        "pared.sparsity.masks": ["Pruned"],
        "pared.sparsity.methods": ["METHODS", "PruningMethod"],
        "pared.sparsity.pattern": ["NM", "Pattern", "Unstructured", "parse"],
    },
)
