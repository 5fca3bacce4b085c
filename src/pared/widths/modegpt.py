"""MoDeGPT's compression of MLPs: a Nyström approximation of the hidden Gram (Lin et al., ICLR 2025, arXiv 2408.09632).

With ``C = E[hᵀh]`` of what the layer reads, channels stay by ridge leverage scores, ``s_j = [C (C + λ I)⁻¹]_jj``, and
the layer becomes the least squares on those that stay, ``W'_K = W C_:K C_KK⁻¹``: the same compensation as of
:mod:`pared.widths.removal`, without gradients and in another order. Its decompositions of query, key, value and output
layers are no widths, and not here.
"""

import torch

from pared.widths.removal import Channels, least_squares


def order_channels(W_ON: torch.Tensor, C_NN: torch.Tensor, ridge: float = 1.0, inputs: int = 1) -> Channels:
    """Order the channels that a weight reads by their ridge leverage scores.

    Args:
        W_ON: the weight ``(out, in)``, any floating dtype.
        C_NN: the Gram of its inputs per token ``(in, in)``, positive definite.
        ridge: λ, relative to the mean of the Gram's diagonal.
        inputs: of the weight that one channel has, side by side; such a channel has the sum of their scores.

    Raises:
        ValueError: the Gram is not positive definite.
    """
    C_NN = C_NN.double()
    ridged_NN = C_NN.clone()
    amount = ridge * C_NN.diagonal().mean()
    ridged_NN.diagonal().add_(amount)
    scores_N = 1 - amount * torch.cholesky_inverse(torch.linalg.cholesky(ridged_NN)).diagonal()
    order_G = scores_N.view(-1, inputs).sum(dim=1).argsort(descending=True, stable=True)
    return least_squares(W_ON.double(), C_NN, order_G, inputs)
