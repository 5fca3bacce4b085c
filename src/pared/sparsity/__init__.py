"""The mathematics of one-shot pruning: tensors in, tensors out."""

from pared.sparsity.masks import Pruned
from pared.sparsity.methods import METHODS, PruningMethod
from pared.sparsity.pattern import NM, Pattern, Unstructured, parse

__all__ = ["METHODS", "NM", "Pattern", "Pruned", "PruningMethod", "Unstructured", "parse"]
