"""Whitened SVD: SVD-LLM (Wang et al., ICLR 2025, arXiv 2403.07378), in the cheapest exact form.

The paper takes ``L Lᵀ = G`` and ``W L = U Σ Vᵀ`` and keeps ``W' = U_k Σ_k V_kᵀ L⁻¹``, which minimises
``||X (W - W')ᵀ||_F`` (Theorem 3.2). Since ``Σ_k V_kᵀ = U_kᵀ W L`` this is ``W' = U_k U_kᵀ W``: no inverse is ever
formed, and only ``U`` is needed, from whichever of two symmetric eigenproblems is smaller.
"""

import logging
import math

import torch

from pared.lowrank.decomposition import Decomposition, from_output_gram, from_root

log = logging.getLogger(__name__)

DAMPINGS = (0.0, 1e-8, 1e-6, 1e-4, 1e-2)
LEAST_PIVOT = 1e-13  # smallest ratio of squared Cholesky pivots of a Gram that counts as full rank


def decompose(W_ON: torch.Tensor, gram_NN: torch.Tensor) -> Decomposition:
    """Decompose a weight by what its outputs are on the calibration data.

    Args:
        W_ON: the weight ``(out, in)``, any floating dtype; computed in float64.
        gram_NN: the input Gram ``Σ xᵀx`` ``(in, in)``, any scale; may be rank-deficient.

    Raises:
        ValueError: no damping makes the Gram positive definite.
    """
    W_ON = W_ON.double()
    L_NN, gram_NN, damping = cholesky_factor(gram_NN.double())
    out_features, in_features = W_ON.shape
    if out_features <= in_features:
        return from_output_gram(W_ON, W_ON @ gram_NN @ W_ON.T, damping)
    return from_root(W_ON, W_ON @ L_NN, damping)


def cholesky_factor(gram_NN: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Return ``L`` with ``L Lᵀ = G + λ·mean(diag G)·I``, the damped Gram, and the least λ of a ladder that works.

    A Gram of fewer tokens than features has no information in some directions. Damping gives those directions an
    equal, tiny weight, so that what is free to choose follows the weight itself; it is logged.

    Raises:
        ValueError: the Gram is not positive semi-definite, or all zero.
    """
    mean = float(gram_NN.diagonal().mean())
    if not (mean > 0 and math.isfinite(mean)):
        raise ValueError(f"the mean of the Gram's diagonal is {mean}; expected a positive number")
    for damping in DAMPINGS:
        damped_NN = gram_NN.clone()
        damped_NN.diagonal().add_(damping * mean)
        L_NN, failed = torch.linalg.cholesky_ex(damped_NN)
        pivots_N = L_NN.diagonal()
        if not int(failed) and (pivots_N.min() / pivots_N.max()).square() > LEAST_PIVOT:
            if damping:
                log.info("Gram of %d features is rank-deficient: relative damping %g", gram_NN.shape[0], damping)
            return L_NN, damped_NN, damping
    raise ValueError(f"the Gram is not positive semi-definite, even with damping {DAMPINGS[-1]}")
