"""Which bases stay: by their share of a weight's mass, and by one threshold over all weights. Tensors in and out."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch


def keep_by_cumulative(importance_R: torch.Tensor, share: float) -> torch.Tensor:
    """Keep the fewest bases that hold this share of the importance, and those equal to the last of them.

    Sorted from the largest, the smallest k with ``cumsum_k ≥ share · sum`` stay. Importances below 0 count as 0: those
    bases do harm. With a share of 1 no basis of any importance goes.

    Args:
        importance_R: of every basis ``(R,)``, 0 for those that were dropped before.
        share: q, 0 to 1.

    Returns:
        True for bases that stay, bool ``(R,)``.
    """
    importance_R = importance_R.double().clamp(min=0)
    if share >= 1:
        return importance_R > 0
    sorted_R = importance_R.sort(descending=True).values
    sums_R = sorted_R.cumsum(0)
    place = int(torch.searchsorted(sums_R, share * sums_R[-1]))
    threshold = sorted_R[min(place, len(sorted_R) - 1)]
    return (importance_R >= threshold) & (importance_R > 0)


class Weight(NamedTuple):
    """What one weight may be stored as: ``(rank + new) (out + in)`` numbers, or ``out · in`` as it is."""

    out_features: int
    in_features: int
    new: int

    @property
    def dense(self) -> int:
        """Numbers of the weight as it is."""
        return self.out_features * self.in_features

    def factors(self, rank: int) -> int:
        """Numbers of two factors of this rank."""
        return rank * (self.out_features + self.in_features)

    def stored(self, rank: int) -> int:
        """Numbers at this many bases: the smaller of factors and the weight as it is."""
        return min(self.dense, self.factors(rank + self.new))

    def grows(self, rank: int) -> bool:
        """Whether factors would be no smaller than the weight."""
        return self.factors(rank + self.new) >= self.dense


def share_for(importance: Mapping[str, torch.Tensor], weights: Mapping[str, Weight], budget: int) -> float:
    """Return the largest share of every weight's importance whose bases fit a budget of numbers, by bisection.

    Args:
        importance: by weight, of every basis ``(R,)``.
        weights: by the same names.
        budget: numbers that may be stored.

    Raises:
        ValueError: the new bases alone are more than the budget.
    """
    _require_room(weights, budget)

    def stored(share: float) -> int:
        return sum(weights[name].stored(int(keep_by_cumulative(c_R, share).sum())) for name, c_R in importance.items())

    if stored(1.0) <= budget:
        return 1.0
    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (low, middle) if stored(middle) > budget else (middle, high)
    return low


def by_budget(
    importance: Mapping[str, torch.Tensor], weights: Mapping[str, Weight], budget: int
) -> dict[str, torch.Tensor]:
    """Keep the bases that are worth most for what they cost, over all weights, within a budget.

    Bases are taken in the order of importance per stored number. A weight that has so many that factors would be no
    smaller stays as it is, with all its bases: from there on more of them cost nothing.

    Args:
        importance: by weight, of every basis ``(R,)``; minus infinity for those that were dropped before.
        weights: by the same names.
        budget: numbers that may be stored.

    Returns:
        True for bases that stay, by weight.

    Raises:
        ValueError: the new bases alone are more than the budget.
    """
    _require_room(weights, budget)
    order = _by_worth(importance, weights)
    ranks = dict.fromkeys(weights, 0)
    spent = sum(weight.stored(0) for weight in weights.values())
    for name in order:
        weight, rank = weights[name], ranks[name]
        cost = weight.stored(rank + 1) - weight.stored(rank)
        if spent + cost <= budget:
            ranks[name] += 1
            spent += cost
    return {name: _largest(importance[name], weights[name], rank) for name, rank in ranks.items()}


def _require_room(weights: Mapping[str, Weight], budget: int) -> None:
    least = sum(weight.stored(0) for weight in weights.values())
    if least > budget:
        raise ValueError(f"{budget:,} parameters may be stored, and the new bases of all weights are {least:,} by "
                         "themselves; ask for fewer new bases or a larger budget")  # fmt: skip


def _by_worth(importance: Mapping[str, torch.Tensor], weights: Mapping[str, Weight]) -> Sequence[str]:
    """Return the name of the weight of every basis that is left, the best for its cost first."""
    names = list(importance)
    worth = torch.cat([importance[name].double() / (weights[name].out_features + weights[name].in_features)
                       for name in names])  # fmt: skip
    owner = torch.cat(
        [torch.full((len(importance[name]),), index, device=worth.device) for index, name in enumerate(names)]
    )
    order = worth.sort(descending=True, stable=True)
    return [names[index] for index in owner[order.indices][order.values.isfinite()].tolist()]


def _largest(importance_R: torch.Tensor, weight: Weight, rank: int) -> torch.Tensor:
    if weight.grows(rank):
        return torch.ones_like(importance_R, dtype=torch.bool)
    mask_R = torch.zeros_like(importance_R, dtype=torch.bool)
    mask_R[importance_R.argsort(descending=True, stable=True)[:rank]] = True
    return mask_R
