"""Plain SVD: the best low-rank weight when nothing is known about the inputs (Eckart and Young, 1936)."""

import torch

from pared.lowrank.decomposition import Decomposition, from_input_scale


def decompose(W_ON: torch.Tensor) -> Decomposition:
    """Decompose a weight by its own singular vectors, ``min ||W - W'||_F``.

    Args:
        W_ON: the weight ``(out, in)``, any floating dtype; computed in float64.
    """
    W_ON = W_ON.double()
    return from_input_scale(W_ON, W_ON.new_ones(W_ON.shape[1]))
