"""ASVD: low rank weighted by how large the inputs are (Yuan et al., 2023, arXiv 2312.05821)."""

import torch

from pared.lowrank import svd
from pared.lowrank.decomposition import Decomposition, at_no_cost, from_input_scale

FLOOR = 1e-6  # added to every scale, as the paper's code does


def decompose(W_ON: torch.Tensor, mean_magnitude_N: torch.Tensor, alpha: float = 0.5) -> Decomposition:
    """Decompose a weight with input channel i scaled by ``(mean_t |x_ti|)^α``; an exact SVD, not a randomised one.

    Args:
        W_ON: the weight ``(out, in)``, any floating dtype; computed in float64.
        mean_magnitude_N: mean of the inputs' magnitudes over tokens ``(in,)``.
        alpha: 0 is the plain SVD, the paper's runs have 0.5.

    Raises:
        ValueError: a magnitude is negative or not finite.
    """
    magnitude_N = mean_magnitude_N.double()
    if not bool(magnitude_N.isfinite().all()) or bool((magnitude_N < 0).any()):
        raise ValueError("a mean magnitude of the inputs is negative or not finite")
    if not bool(magnitude_N.any()):
        return at_no_cost(svd.decompose(W_ON), "nothing but zeros reach it on the text")
    return from_input_scale(W_ON.double(), magnitude_N**alpha + FLOOR)
