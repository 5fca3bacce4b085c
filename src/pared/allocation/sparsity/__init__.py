"""How sparse each block or site becomes: statistics in, sparsities of an exact mean out; one file per formula."""

from pared.allocation.sparsity.alphapruning import alphapruning, eigenvalues, hill_alpha
from pared.allocation.sparsity.er import er
from pared.allocation.sparsity.loss import least_loss, pruning_loss
from pared.allocation.sparsity.nm import Mixture, mixture
from pared.allocation.sparsity.owl import outlier_ratio, owl
from pared.allocation.sparsity.threshold import global_threshold
from pared.allocation.sparsity.uniform import uniform

__all__ = [
    "Mixture",
    "alphapruning",
    "eigenvalues",
    "er",
    "global_threshold",
    "hill_alpha",
    "least_loss",
    "mixture",
    "outlier_ratio",
    "owl",
    "pruning_loss",
    "uniform",
]
