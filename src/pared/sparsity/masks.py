"""From scores to the weights that are kept: the smallest scores go, in groups that are a method's choice.

Masks are True where a weight is kept. Counts are exact, also when scores are equal: the earlier of two equal weights,
in the order of rows and then of inputs, goes first.

Legend of the shape suffixes: O outputs, N inputs; G the weights that compete, along the last dimension; X all others.
"""

from typing import NamedTuple

import numpy as np
import torch

from pared.sparsity.pattern import NM, Unstructured


class Pruned(NamedTuple):
    """A pruned weight ``(out, in)`` of the dtype it had, exactly 0.0 where ``mask`` is False."""

    weight: torch.Tensor
    mask: torch.Tensor


def apply(W_ON: torch.Tensor, mask_ON: torch.Tensor) -> Pruned:
    """Put zeros where the mask is False; what is kept stays bit for bit."""
    return Pruned(W_ON.masked_fill(~mask_ON, 0), mask_ON)


def per_matrix(scores_ON: torch.Tensor, pattern: Unstructured) -> torch.Tensor:
    """Keep all but ``⌊out · in · sparsity⌋`` weights of the whole matrix.

    Raises:
        ValueError: a score is not finite.
    """
    _check(scores_ON)
    return _keep(scores_ON.flatten(), pattern.zeros(scores_ON.numel())).view(scores_ON.shape)


def per_row(scores_ON: torch.Tensor, pattern: Unstructured) -> torch.Tensor:
    """Keep all but ``⌊in · sparsity⌋`` weights of every output.

    Raises:
        ValueError: a score is not finite.
    """
    _check(scores_ON)
    return _keep(scores_ON, pattern.zeros(scores_ON.shape[1]))


def per_group(scores_ON: torch.Tensor, pattern: NM) -> torch.Tensor:
    """Keep N of every M consecutive inputs of every output.

    Raises:
        ValueError: a score is not finite, or groups do not fill the inputs.
    """
    _check(scores_ON)
    pattern.check(scores_ON.shape[1])
    scores_XG = scores_ON.reshape(len(scores_ON), -1, pattern.group)
    return _keep(scores_XG, pattern.group - pattern.kept).view(scores_ON.shape)


def by_share(scores_ON: torch.Tensor, pattern: Unstructured) -> torch.Tensor:
    """Keep what is left when every output gives up the same share α of its scores (Wanda's variant).

    An output loses its smallest scores as long as they add up to at most α of all of its scores, so that outputs with
    a few large scores lose more weights than others. The official code looks for α by bisection until the sparsity of
    the matrix is right to 1e-3. A weight goes once α reaches the running sum of sorted scores up to its own, as a share
    of the row's; so the α of an exact count can be read off, and ``⌊out · in · sparsity⌋`` weights go.

    Raises:
        ValueError: a score is negative or not finite.
    """
    _check(scores_ON)
    if bool((scores_ON < 0).any()):
        raise ValueError("a score is negative; shares of a row need scores of 0 and more")
    sorted_ON = scores_ON.double().sort(dim=1, stable=True)
    sums_ON = sorted_ON.values.cumsum(dim=1)
    shares_ON = sums_ON / sums_ON[:, -1:].clamp(min=torch.finfo(sums_ON.dtype).tiny)
    return per_matrix(torch.empty_like(shares_ON).scatter_(1, sorted_ON.indices, shares_ON), pattern)


def _check(scores_ON: torch.Tensor) -> None:
    if scores_ON.ndim != 2 or not scores_ON.numel():
        raise ValueError(f"scores of shape {tuple(scores_ON.shape)}: expected a weight's (out, in), not empty")
    if not bool(scores_ON.isfinite().all()):
        raise ValueError("a score is NaN or infinite, and so is the weight or a statistic of its inputs")


def _keep(scores_G: torch.Tensor, zeros: int) -> torch.Tensor:
    """Return a mask that leaves out the ``zeros`` smallest of the last dimension, the first of equal ones."""
    if not zeros:
        return torch.ones_like(scores_G, dtype=torch.bool)
    threshold_1 = _smallest(scores_G, zeros)
    below_G, equal_G = scores_G < threshold_1, scores_G == threshold_1
    equal_to_go_1 = zeros - below_G.sum(dim=-1, keepdim=True)
    return ~(below_G | equal_G & (equal_G.cumsum(dim=-1) <= equal_to_go_1))


def _smallest(scores_G: torch.Tensor, count: int) -> torch.Tensor:
    """Return the ``count``-th smallest of the last dimension, kept as 1; NumPy is seven times as fast on a CPU."""
    if scores_G.device.type != "cpu" or scores_G.dtype not in (torch.float32, torch.float64):
        return scores_G.kthvalue(count, dim=-1, keepdim=True).values
    return torch.from_numpy(np.partition(scores_G.detach().numpy(), count - 1)[..., count - 1 : count])
