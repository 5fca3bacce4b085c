"""Loss-optimal low rank: weighted on both sides by what the loss feels; our own method.

For a linear layer ``y = x Wᵀ`` the second-order, Kronecker-factored (K-FAC, Martens and Grosse 2015) estimate of what
a change ``D = W' - W`` costs is ``½ tr(B D A Dᵀ)`` nats a token, ``A = E[xᵀx]`` the Gram of the inputs and
``B = E[gᵀg]`` that of the gradients of the loss at the outputs. With ``B = L Lᵀ`` and ``Lᵀ W A^½ = U Σ Vᵀ`` the best
weight of rank k is ``W' = L⁻ᵀ U_k U_kᵀ Lᵀ W``, and it costs ``½ Σ_{j>k} s_j²``: the same unit for every layer of a
model, so that one global budget decides all ranks. ``B = I`` is SVD-LLM, ``A = B = I`` the plain SVD.
"""

import torch

from pared.lowrank.decomposition import Decomposition, from_output_gram, from_root, weigh_outputs

DAMPING = 1e-4  # of the mean diagonal, on both sides


def decompose(W_ON: torch.Tensor, gram_NN: torch.Tensor, gradient: torch.Tensor) -> Decomposition:
    """Decompose a weight by what the loss feels.

    Args:
        W_ON: the weight ``(out, in)``, any floating dtype; computed in float64.
        gram_NN: ``A``, the input Gram per token ``(in, in)``.
        gradient: ``B`` per token: the full Gram of the output gradients ``(out, out)``, its diagonal ``(out,)``, or one
            number, the mean of the diagonal, which leaves the factors at SVD-LLM's and makes the losses comparable.

    Raises:
        ValueError: a statistic is not finite, negative, or all zero.
    """
    return decompose_weighted(W_ON, gram_NN, root(gradient, W_ON.shape[0]))


def decompose_weighted(W_ON: torch.Tensor, gram_NN: torch.Tensor, L_OO: torch.Tensor) -> Decomposition:
    """Decompose a weight from a root of ``B``, as :func:`root` gives it.

    Raises:
        ValueError: the input Gram is not finite, negative, or all zero.
    """
    W_ON, gram_NN = W_ON.double(), _damped(gram_NN.double(), "input Gram")
    if W_ON.shape[0] > W_ON.shape[1]:
        return from_root(W_ON, torch.linalg.cholesky(gram_NN), L_OO=L_OO)
    weighted_ON = weigh_outputs(L_OO, W_ON)
    return from_output_gram(W_ON, weighted_ON @ gram_NN @ weighted_ON.T, L_OO=L_OO)


def root(gradient: torch.Tensor, out_features: int) -> torch.Tensor:
    """Return ``L`` with ``L Lᵀ = B``, damped, float64: a diagonal ``(out,)`` unless ``B`` is full."""
    gradient = gradient.double()
    if gradient.ndim == 2:
        return torch.linalg.cholesky(_damped(gradient, "output gradient Gram"))
    energy_O = gradient.expand(out_features)
    mean = _mean(energy_O, "output gradient energy")
    return (energy_O + DAMPING * mean).sqrt()


def _damped(gram_NN: torch.Tensor, what: str) -> torch.Tensor:
    damped_NN = gram_NN.clone()
    damped_NN.diagonal().add_(DAMPING * _mean(gram_NN.diagonal(), what))
    return damped_NN


def _mean(diagonal_N: torch.Tensor, what: str) -> float:
    mean = float(diagonal_N.mean())
    if not (0 < mean < float("inf")):
        raise ValueError(f"the mean of the {what} is {mean}; expected a positive number")
    return mean
