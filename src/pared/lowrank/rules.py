"""From a weight, its statistics and a method's options to a decomposition: what ``methods`` declares."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from pared.lowrank import asvd, fwsvd, loss_optimal, sharing, svd, whitening
from pared.lowrank.decomposition import Decomposition
from pared.lowrank.registry import Statistics, fisher, output_gradient


def plain(W_ON: torch.Tensor, _: Statistics, __: Mapping[str, Any]) -> Decomposition:
    """SVD of the weight alone."""
    return svd.decompose(W_ON)


def fisher_weighted(W_ON: torch.Tensor, statistics: Statistics, options: Mapping[str, Any]) -> Decomposition:
    """FWSVD."""
    (name,) = fisher(options)
    return fwsvd.decompose(W_ON, statistics[name], options["fisher_power"])


def scaled(W_ON: torch.Tensor, statistics: Statistics, options: Mapping[str, Any]) -> Decomposition:
    """ASVD."""
    return asvd.decompose(W_ON, statistics["magnitude"], options["alpha"])


def _weighting(W_ON: torch.Tensor, statistics: Statistics, options: Mapping[str, Any]) -> torch.Tensor:
    return next((statistics[name] for name in output_gradient(options)), W_ON.new_ones(()))


def both_sides(W_ON: torch.Tensor, statistics: Statistics, options: Mapping[str, Any]) -> Decomposition:
    """Weight inputs and outputs."""
    return loss_optimal.decompose(W_ON, statistics["mean_gram"], _weighting(W_ON, statistics, options))


def both_sides_group(
    W_ON: Sequence[torch.Tensor], statistics: Sequence[Statistics], options: Mapping[str, Any]
) -> Decomposition:
    """Weight inputs and outputs of several weights that share a basis."""
    weightings = [_weighting(weight, own, options) for weight, own in zip(W_ON, statistics, strict=True)]
    return loss_optimal.decompose_group(W_ON, sharing.pooled(statistics, "mean_gram"), weightings)


def whitened_group(
    W_ON: Sequence[torch.Tensor], statistics: Sequence[Statistics], _: Mapping[str, Any]
) -> Decomposition:
    """Whiten the inputs of several weights that share a basis."""
    return whitening.decompose(sharing.stacked(W_ON), sharing.pooled(statistics, "gram"))


def whitened(W_ON: torch.Tensor, statistics: Statistics, _: Mapping[str, Any]) -> Decomposition:
    """Whiten the inputs, by their Gram or by that of the outputs."""
    if "gram" in statistics:
        return whitening.decompose(W_ON, statistics["gram"])
    return whitening.decompose_by_outputs(W_ON, statistics["output_gram"])
