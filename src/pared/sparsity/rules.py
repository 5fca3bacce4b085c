"""From a weight, a pattern, its statistics and a method's options to a pruned weight: what ``methods`` declares."""

from collections.abc import Mapping
from typing import Any

import torch

from pared.sparsity import magnitude, sparsegpt, wanda
from pared.sparsity.masks import Pruned
from pared.sparsity.pattern import Pattern
from pared.sparsity.registry import Statistics


def by_magnitude(W_ON: torch.Tensor, pattern: Pattern, _: Statistics, __: Mapping[str, Any]) -> Pruned:
    """Prune by the size of the weights."""
    return magnitude.prune(W_ON, pattern)


def by_wanda(W_ON: torch.Tensor, pattern: Pattern, statistics: Statistics, options: Mapping[str, Any]) -> Pruned:
    """Prune by the size of the weights times that of what they multiply."""
    return wanda.prune(W_ON, statistics["energy"], pattern, options["variant"])


def by_sparsegpt(W_ON: torch.Tensor, pattern: Pattern, statistics: Statistics, options: Mapping[str, Any]) -> Pruned:
    """Prune input by input, later weights making up for it."""
    return sparsegpt.prune(W_ON, statistics["gram"], pattern, options["block"], options["damping"])
