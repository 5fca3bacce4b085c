"""What every allocation of sparsity shares: a mean that is met exactly whatever is clamped, and a spread around it."""

from collections.abc import Callable

import torch

from pared.allocation.dsa.names import Sign
from pared.errors import ParedError

MOST = 1 - 1e-6  # the largest sparsity: below 1, so that a row of fewer than a million weights keeps one
SAME = 1e-8  # statistics whose range is at most this much of their largest magnitude are equal
STEPS = 200  # of the bisection; it ends earlier where two numbers have no other between them


def shares(count: int, weights: torch.Tensor | None) -> torch.Tensor:
    """Return what each of ``count`` units weighs in a mean, float64 ``(count,)`` summing to 1; equal without weights.

    Raises:
        ParedError: there are no units, a weight is not a positive number, or there is not one for every unit.
    """
    if not count:
        raise ParedError("there are no units to give a sparsity to")
    if weights is None:
        return torch.full((count,), 1 / count, dtype=torch.float64)
    weights = weights.detach().cpu().double()
    if weights.shape != (count,):
        raise ParedError(f"got weights of shape {tuple(weights.shape)} for {count} units; expected one for each")
    if not bool((weights.isfinite() & (weights > 0)).all()):
        raise ParedError(f"weights of units are positive numbers; got {weights.tolist()}")
    return weights / weights.sum()


def require_sparsity(sparsity: float, most: float = MOST) -> None:
    """Check a target.

    Raises:
        ParedError: it is not in [0, most].
    """
    if not 0 <= sparsity <= most:
        raise ParedError(f"sparsity is the fraction of the weights that become zero, in [0, {most:g}]; got {sparsity}")


def meet(
    curve: Callable[[float], torch.Tensor], low: float, high: float, sparsity: float, weights: torch.Tensor | None
) -> torch.Tensor:
    """Return sparsities on a curve that rises with its argument, with exactly the mean that is asked for.

    The argument is bisected; what a jump of the curve leaves open (scores that are equal) is shared out in proportion
    between its two sides.

    Args:
        curve: from a number to the sparsities of all units ``(L,)``; none of them falls.
        low: where to begin.
        high: where to end.
        sparsity: the mean.
        weights: of the units in the mean ``(L,)``; equal if none.

    Raises:
        ParedError: the mean lies outside what the curve reaches.
    """
    under_L, over_L = curve(low), curve(high)
    share_L = shares(len(under_L), weights)
    least, most = float(share_L @ under_L), float(share_L @ over_L)
    if not least - 1e-12 <= sparsity <= most + 1e-12:
        raise ParedError(f"sparsity {sparsity:g} cannot be met: the limits of the units allow {least:g} to {most:g}")
    for _ in range(STEPS):
        middle = (low + high) / 2
        if middle in (low, high):
            break
        at_L = curve(middle)
        if float(share_L @ at_L) <= sparsity:
            low, under_L = middle, at_L
        else:
            high, over_L = middle, at_L
    gap = float(share_L @ (over_L - under_L))
    part = (sparsity - float(share_L @ under_L)) / gap if gap > 0 else 0.0
    return under_L + min(max(part, 0.0), 1.0) * (over_L - under_L)


def shift_to_mean(
    wished_L: torch.Tensor, sparsity: float, weights: torch.Tensor | None = None, most: float = MOST
) -> torch.Tensor:
    """Return ``clamp(s_l + t, 0, most)`` with the one shift t that makes the mean exact.

    Without a clamp that is a shift of all, so that differences stay as they were.

    Args:
        wished_L: sparsities in any range ``(L,)``.
        sparsity: the mean.
        weights: of the units in the mean ``(L,)``; equal if none.
        most: the upper limit.

    Raises:
        ParedError: the target, the limit or a wish is out of range.
    """
    require_sparsity(sparsity, most)
    wished_L = wished_L.detach().cpu().double()
    if not bool(wished_L.isfinite().all()):
        raise ParedError(f"a wished sparsity is not a finite number: {wished_L.tolist()}")
    moved_L = wished_L + (sparsity - float(shares(len(wished_L), weights) @ wished_L))
    if bool(((moved_L >= 0) & (moved_L <= most)).all()):
        return moved_L
    low, high = -float(wished_L.max()), most - float(wished_L.min())
    return meet(lambda t: (wished_L + t).clamp(0, most), low, high, sparsity, weights)


def same(statistic_L: torch.Tensor) -> bool:
    """Whether numbers are equal up to what rounding and sampling leave, by their range relative to their size."""
    return float(statistic_L.max() - statistic_L.min()) <= SAME * float(statistic_L.abs().max())


def spread(
    statistic_L: torch.Tensor, sparsity: float, width: float, sign: Sign, weights: torch.Tensor | None = None
) -> torch.Tensor:
    """Return ``s_l = S ± 2λ (a_l - mean a)``, ``a`` the statistic moved and stretched to [0, 1] (OWL, DSA).

    The largest and the smallest differ by ``2λ`` unless a limit of [0, 1) is reached; then all are moved by one number
    so that the mean stays exact. Equal statistics give equal sparsities.

    Args:
        statistic_L: one number for every unit ``(L,)``.
        sparsity: the mean S.
        width: λ.
        sign: ``prune`` gives high statistics high sparsities, ``keep`` low ones.
        weights: of the units in the mean ``(L,)``; equal if none.

    Raises:
        ParedError: a statistic is not finite, or the target is out of range.
    """
    statistic_L = statistic_L.detach().cpu().double()
    if not bool(statistic_L.isfinite().all()):
        raise ParedError(f"a statistic is not a finite number: {statistic_L.tolist()}")
    if same(statistic_L):
        return shift_to_mean(torch.zeros_like(statistic_L), sparsity, weights)
    a_L = (statistic_L - statistic_L.min()) / (statistic_L.max() - statistic_L.min())
    return shift_to_mean((2 * width if sign == "prune" else -2 * width) * a_L, sparsity, weights)
