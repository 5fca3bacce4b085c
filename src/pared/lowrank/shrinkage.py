"""Shrinkage of second moments towards equal energies: what a text of few tokens says too much of.

A Gram of T tokens is a mean over T samples. Its largest eigenvalues come out too large and its smallest too small, so
that a decomposition weighted by it fits the text it was taken of. ``(1 - a) S + a mean(diag S) I`` takes some of that
back. Both sides of a two-sided decomposition are shrunk here, before anything reads them: what is decomposed, compared
for sharing or priced sees the same moments.
"""

from collections.abc import Mapping
from typing import Literal

import torch

from pared.remembered import once_per_tensor

Shrinkage = float | Literal["auto"]
LEAST = 1e-4  # where anything is shrunk at all: the result is of full rank, and nothing need be damped after it


def shrunk(moments: torch.Tensor, amount: float) -> torch.Tensor:
    """Return ``(1 - a) S + a mean(diag S) I``, or the very tensor for ``a = 0``.

    Args:
        moments: a Gram ``(n, n)``, its diagonal ``(n,)``, or one number, which stays as it is; any scale.
        amount: a, 0 to 1.
    """
    return _shrunk(moments, amount) if amount and moments.ndim else moments


@once_per_tensor
def _shrunk(moments: torch.Tensor, amount: float) -> torch.Tensor:
    diagonal = moments.diagonal() if moments.ndim == 2 else moments
    equal = amount * diagonal.mean()
    result = moments * (1 - amount)
    (result.diagonal() if result.ndim == 2 else result).add_(equal)
    return result


def chosen(asked: Mapping[str, Shrinkage], name: str, by_rule: float) -> float:
    """Return how far a statistic is shrunk, 0 for not at all.

    Args:
        asked: by name of the statistic: an amount, or ``auto`` for the rule.
        name: of the statistic; one that is not among them is left as it is.
        by_rule: what the rule says of it.
    """
    amount = asked.get(name, 0.0)
    amount = by_rule if amount == "auto" else amount
    return max(LEAST, amount) if asked.get(name, 0.0) != 0 else 0.0
