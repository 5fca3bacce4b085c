"""AlphaPruning: heavy-tailed spectra are pruned less (H. Lu et al., NeurIPS 2024, arXiv 2410.10912); needs no data."""

from typing import Literal

import torch

from pared.allocation.sparsity_budget import require_sparsity, same, shares, shift_to_mean
from pared.errors import ParedError

EPSILON = 0.3
BINS = 100  # of the histogram whose peak is looked for
AROUND_PEAK = (0.95, 1.5)  # where the tail may begin, in units of the peak
NOISE = 1e-14  # eigenvalues this small relative to the largest are rounding

Tail = Literal["xmin_mid", "xmin_peak"]


def eigenvalues(W_ON: torch.Tensor) -> torch.Tensor:
    """Return the eigenvalues of ``Wᵀ W`` that are not zero, rising, float64.

    Raises:
        ParedError: the weight is zero or not finite.
    """
    values_R = torch.linalg.svdvals(W_ON.double()).square().flip(0)
    if not (values_R[-1] > 0 and bool(values_R.isfinite().all())):
        raise ParedError(f"the largest eigenvalue of a weight {tuple(W_ON.shape)} is {float(values_R[-1])}")
    return values_R[values_R > NOISE * values_R[-1]]


def hill_alpha(eigenvalues_R: torch.Tensor, tail: Tail = "xmin_mid") -> float:
    """Return the exponent of the tail of a spectrum, ``α = 1 + n / Σ_{j≥i} ln(e_j / e_i)`` over the n from index i on.

    Args:
        eigenvalues_R: rising, positive.
        tail: ``xmin_mid`` begins it at the middle; ``xmin_peak``, what the released results use, near the peak of the
            histogram of ``log10 e``, where it fits a power law best by the Kolmogorov-Smirnov distance. (The released
            code compares its lower bound with a logarithm by mistake, so that it excludes nothing; here it holds.)

    Raises:
        ParedError: fewer than two different eigenvalues are in the tail.
    """
    e_R = eigenvalues_R.double()
    start = len(e_R) // 2 if tail == "xmin_mid" else _start_near_peak(e_R)
    alpha = _alpha(e_R[start:])
    if not alpha < float("inf"):
        raise ParedError(
            f"the tail of {len(e_R)} eigenvalues has fewer than two different ones; its exponent is undefined"
        )
    return alpha


def alphapruning(
    alphas_L: torch.Tensor, sparsity: float, epsilon: float = EPSILON, weights: torch.Tensor | None = None
) -> torch.Tensor:
    """Return ``s_l = S q_l Σp / Σ(p q)`` with ``q`` the exponents moved and stretched to [1 - ε, 1 + ε].

    Where the paper's formula leaves [0, 1), as it does at S = 0.8, sparsities are held at the limit and all are moved
    so that the mean stays exact.

    Args:
        alphas_L: of every block, the mean over its weights; or of every site.
        sparsity: the mean S.
        epsilon: ε.
        weights: the parameters p ``(L,)``; every unit counts the same if none.

    Raises:
        ParedError: an exponent is not finite, or ε or the target is out of range.
    """
    require_sparsity(sparsity)
    if not 0 <= epsilon <= 1:
        raise ParedError(f"epsilon of alphapruning is in [0, 1]; got {epsilon}")
    alphas_L = alphas_L.detach().cpu().double()
    if not bool(alphas_L.isfinite().all()):
        raise ParedError(f"an exponent of a spectrum is not a finite number: {alphas_L.tolist()}")
    low, high = alphas_L.min(), alphas_L.max()
    a_L = torch.full_like(alphas_L, 0.5) if same(alphas_L) else (alphas_L - low) / (high - low)
    q_L = 1 - epsilon + 2 * epsilon * a_L
    return shift_to_mean(sparsity * q_L / (shares(len(q_L), weights) @ q_L), sparsity, weights)


def _alpha(tail_R: torch.Tensor) -> float:
    """Return the exponent of a rising tail; infinite if all in it are equal."""
    total = float((tail_R / tail_R[0]).log().sum())
    return 1 + len(tail_R) / total if total > 0 else float("inf")


def _start_near_peak(e_R: torch.Tensor) -> int:
    """Return the index from which the eigenvalues fit a power law best."""
    logs_R = e_R.log10()
    low, high = float(logs_R[0]), float(logs_R[-1])
    if low == high:
        return 0
    peak = int(torch.histc(logs_R, BINS, low, high).argmax())
    middle = 10 ** (low + (peak + 0.5) * (high - low) / BINS)
    inside_R = (e_R >= AROUND_PEAK[0] * middle) & (e_R <= AROUND_PEAK[1] * middle)
    starts = [start for start in inside_R.nonzero().flatten().tolist() if start < len(e_R) - 1] or [len(e_R) // 2]
    return min(starts, key=lambda start: _distance(e_R[start:]))


def _distance(tail_R: torch.Tensor) -> float:
    """Return the Kolmogorov-Smirnov distance of a rising tail from the power law of its own exponent."""
    alpha = _alpha(tail_R)
    if alpha == float("inf"):
        return float("inf")
    ranks_R = torch.arange(len(tail_R), dtype=torch.float64, device=tail_R.device) / len(tail_R)
    return float((1 - (tail_R / tail_R[0]) ** (1 - alpha) - ranks_R).abs().max())
