"""FWSVD: low rank weighted by Fisher information (Hsu et al., ICLR 2022, arXiv 2207.00112).

The paper writes ``W (in, out)`` and weighs its rows, the input features, by ``Î = diag(√I)`` with ``I_i = Σ_j F_ij``,
the Fisher information summed over outputs: ``min ||Î W - Î A B||_F`` (section 3). In torch's ``(out, in)`` those rows
are columns.
"""

import torch

from pared.lowrank import svd
from pared.lowrank.decomposition import Decomposition, at_no_cost, from_input_scale

LEAST = 1e-12  # smallest importance, relative to the mean: a feature without gradient still has a place


def decompose(W_ON: torch.Tensor, fisher_N: torch.Tensor, power: float = 0.5) -> Decomposition:
    """Decompose a weight, its input features weighted by the Fisher information of the task loss.

    Args:
        W_ON: the weight ``(out, in)``, any floating dtype; computed in float64.
        fisher_N: Fisher information of every input feature, summed over outputs ``(in,)``, any scale.
        power: of the importance; 0.5 follows from the weighted objective, 1.0 is the other reading of the paper.

    Raises:
        ValueError: the Fisher information is negative or not finite.
    """
    fisher_N = fisher_N.double()
    if not bool(fisher_N.isfinite().all()) or bool((fisher_N < 0).any()):
        raise ValueError("the Fisher information is negative or not finite")
    if not bool(fisher_N.any()):  # every feature counts the same
        return at_no_cost(svd.decompose(W_ON), "no gradient of the loss reaches it")
    importance_N = fisher_N.clamp(min=float(fisher_N.mean()) * LEAST)
    return from_input_scale(W_ON.double(), importance_N**power)
