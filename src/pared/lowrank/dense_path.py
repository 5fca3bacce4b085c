"""Targets that the dense model sets: what a site ought to output behind a compressed prefix.

Behind compressed blocks a site reads ``X'`` where the dense model reads ``X``. Its targets may be what the dense weight
makes of the inputs it has, ``X' Wᵀ``, what the dense model outputs, ``X Wᵀ``, or, for a share λ between 0 and 1,

    ``T = ((1 - λ) X' + λ X) Wᵀ``.

With λ = 0 errors of the prefix are carried on as they are. With λ = 1 every site makes good what can be made good by
a linear map; as a regression on noisy inputs this shrinks what it outputs, and block after block the shrinkage
multiplies. (The asymmetric calibration of GPTAQ, arXiv 2504.02692, sets such targets for quantisation.)

Legend: N inputs, O outputs; ``G' = E[x'ᵀx']`` and ``C = E[xᵀx']`` per token.
"""

import torch

DAMPING = 1e-3  # of the mean diagonal


def mixed_cross(gram_NN: torch.Tensor, cross_NN: torch.Tensor, share: float) -> torch.Tensor:
    """Return the cross Gram of the inputs the targets are made from and those there are: ``(1 - λ) G' + λ C``."""
    return gram_NN + share * (cross_NN - gram_NN)


def target(W_ON: torch.Tensor, gram_NN: torch.Tensor, cross_NN: torch.Tensor, share: float) -> torch.Tensor:
    """Return the weight that comes closest to the targets, ``W + λ W (C - G') G'⁻¹``, ``(out, in)`` float64.

    Any low-rank weight's error against the targets is its error against this weight plus a constant.

    Args:
        W_ON: the dense weight ``(out, in)``.
        gram_NN: ``G'`` ``(in, in)``; damped, so that directions that no input reaches keep their weights.
        cross_NN: ``C`` ``(in, in)``, of the same scale.
        share: λ.
    """
    W_ON, gram_NN = W_ON.double(), gram_NN.double()
    damped_NN = gram_NN.clone()
    damped_NN.diagonal().add_(DAMPING * gram_NN.diagonal().mean().clamp(min=torch.finfo(torch.float64).tiny))
    change_ON = W_ON @ (cross_NN.double() - gram_NN)
    return W_ON + share * torch.linalg.solve(damped_NN, change_ON, left=False)
