"""Plain SVD: the best low-rank weight when nothing is known about the inputs (Eckart and Young, 1936)."""

import torch

from pared.lowrank.decomposition import Decomposition, from_output_gram, from_root


def decompose(W_ON: torch.Tensor) -> Decomposition:
    """Decompose a weight by its own singular vectors, ``min ||W - W'||_F``.

    Args:
        W_ON: the weight ``(out, in)``, any floating dtype; computed in float64.
    """
    W_ON = W_ON.double()
    out_features, in_features = W_ON.shape
    return from_output_gram(W_ON, W_ON @ W_ON.T) if out_features <= in_features else from_root(W_ON, W_ON)
