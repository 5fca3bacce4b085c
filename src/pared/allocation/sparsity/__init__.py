"""How sparse each block or site becomes: statistics in, sparsities of an exact mean out; one file per formula."""

from pared.allocation.sparsity.alphapruning import alphapruning, eigenvalues, hill_alpha
from pared.allocation.sparsity.er import er
from pared.allocation.sparsity.loss import least_loss, pruning_loss
from pared.allocation.sparsity.nm import Mixture, mixture
from pared.allocation.sparsity.owl import outlier_ratio, owl
from pared.allocation.sparsity.threshold import one_threshold
from pared.allocation.sparsity.uniform import uniform

__all__ = [
    "Mixture",
    "alphapruning",
    "eigenvalues",
    "er",
    "hill_alpha",
    "least_loss",
    "mixture",
    "one_threshold",
    "outlier_ratio",
    "owl",
    "pruning_loss",
    "uniform",
]
