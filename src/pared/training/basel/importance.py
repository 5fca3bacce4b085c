"""What a basis is worth to the task: its coefficient, or what the loss would gain or lose without it."""

from collections.abc import Callable, Mapping

import torch


def magnitude(c_R: torch.Tensor) -> torch.Tensor:
    """Return Basel's own: the coefficient, which is the relearned singular value."""
    return c_R


def fisher(c_R: torch.Tensor, square_R: torch.Tensor) -> torch.Tensor:
    """Return ``½ c² E[g²]``, with ``g = ∂L/∂c``: the expected loss with Fisher information for curvature."""
    return 0.5 * c_R.square() * square_R


def taylor(c_R: torch.Tensor, g_R: torch.Tensor, h_R: torch.Tensor) -> torch.Tensor:
    """Return ``-g c + ½ h c²``, what the loss rises by when a coefficient becomes 0 (BSI, arXiv 2605.01627).

    Exact for a quadratic loss with a diagonal Hessian.

    Args:
        c_R: coefficients ``(R,)``.
        g_R: gradients of the loss with respect to them.
        h_R: the diagonal of its Hessian.
    """
    return -g_R * c_R + 0.5 * h_R * c_R.square()


def curvature(
    coefficients: Mapping[str, torch.Tensor],
    gradients: Callable[[Mapping[str, torch.Tensor]], Mapping[str, torch.Tensor]],
    probes: int,
    step: float,
    generator: torch.Generator,
) -> dict[str, torch.Tensor]:
    """Estimate the diagonal of the Hessian by differences of gradients along random signs (Hutchinson).

    ``h ≈ mean_v [v · (∇L(c + ε v) - ∇L(c - ε v)) / 2ε]``: what other coefficients add has mean 0. The step ε is
    relative to each coefficient, so that none changes its sign.

    Args:
        coefficients: by weight ``(R,)``.
        gradients: of the loss at other coefficients, by weight.
        probes: how many v.
        step: ε relative to the coefficient, below 1.
        generator: draws the signs.

    Returns:
        By weight, ``(R,)``; 0 for coefficients that are 0.
    """
    found = {name: torch.zeros_like(c_R) for name, c_R in coefficients.items()}
    for _ in range(probes):
        moves = {
            name: step * c_R * (2.0 * torch.randint(0, 2, c_R.shape, generator=generator).to(c_R) - 1)
            for name, c_R in coefficients.items()
        }
        above = gradients({name: c_R + moves[name] for name, c_R in coefficients.items()})
        below = gradients({name: c_R - moves[name] for name, c_R in coefficients.items()})
        for name, move_R in moves.items():
            difference_R = (above[name] - below[name]) / (2 * move_R)
            found[name] += torch.where(move_R == 0, torch.zeros_like(move_R), difference_R) / probes
    return found
