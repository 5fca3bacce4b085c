"""From a weight, its statistics and a method's options to what can be pruned: what ``registry`` declares."""

from collections.abc import Sequence

import torch

from pared.schema.options import Options
from pared.sparsity import magnitude, sparsegpt, wanda
from pared.sparsity.registry import SparseGpt, Statistics, Wanda
from pared.sparsity.solution import PruningSolution

Weights = Sequence[torch.Tensor]


def by_magnitude(W_ON: Weights, _: Sequence[Statistics], __: Options) -> PruningSolution:
    """Prune by the size of the weights."""
    (weight_ON,) = W_ON
    return magnitude.solve(weight_ON)


def by_wanda(W_ON: Weights, statistics: Sequence[Statistics], options: Wanda) -> PruningSolution:
    """Prune by the size of the weights times that of what they multiply."""
    (weight_ON,), (own,) = W_ON, statistics
    return wanda.solve(weight_ON, own["energy"], options.variant)


def by_sparsegpt(W_ON: Weights, statistics: Sequence[Statistics], options: SparseGpt) -> PruningSolution:
    """Prune input by input, later weights making up for it."""
    (weight_ON,), (own,) = W_ON, statistics
    return sparsegpt.solve(weight_ON, own["gram"], options.block, options.damping)
