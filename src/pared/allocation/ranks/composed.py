"""Channel groups that lose channels and whose layers are given ranks besides: what each width leaves to factorise."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from pared.allocation.rank_budget import tail_energy
from pared.allocation.units import Budget, Channels, Evidence

if TYPE_CHECKING:
    from pared.schema.bits import Form
    from pared.structure.model import Site

MOST_WIDTHS = 24  # of a group, at which ranks are considered


@dataclass(frozen=True)
class Table:
    """The candidates for one unit, or for the layers of a channel group together; the last is to stay dense.

    Attributes:
        costs: parameters, or bytes, of each, rising, float64.
        losses: of each, float64.
        sizes: the rank, or the width, of each but the last; of every one, where forms are given, 0 for staying dense.
        forms: in how few bits each is stored, where the budget is one of bytes.
    """

    costs: torch.Tensor
    losses: torch.Tensor
    sizes: Sequence[int]
    forms: "Sequence[Form | None] | None" = None

    def best(self, t: float) -> tuple[float, int]:
        """Return the least ``loss + t · cost``, and the candidate that has it."""
        values = self.losses + t * self.costs
        index = int(values.argmin())
        return float(values[index]), index

    def size(self, index: int) -> int | None:
        """Return the rank or width of a candidate, None for staying dense."""
        return (self.sizes[index] or None) if index < len(self.sizes) else None

    def form(self, index: int) -> "Form | None":
        """Return in how few bits a candidate is stored, None for as the model has it."""
        return None if self.forms is None else self.forms[index]


class Composed:
    """One channel group: every width with every rank of its layers.

    A rank of what is left of a layer is taken to lose what it loses of the whole layer, times the share of the layer's
    energy that is left: the channels that go are those that matter least, and the directions stay about the same.
    Nothing is decomposed anew.

    Args:
        one: the group, with what its channels cost and the energies of its layers.
        budget: what a rank costs.
        evidence: the costs of the ranks.
    """

    def __init__(self, one: Channels, budget: Budget, evidence: Evidence) -> None:
        assert one.cost is not None
        self.widths = self.widths_of(one, budget)
        index_W = torch.tensor(list(self.widths), dtype=torch.long)
        self._losses_W = tail_energy(one.cost).cpu()[index_W]
        self._costs: dict[str, torch.Tensor] = {}
        self._losses: dict[str, torch.Tensor] = {}
        for site in one.group.sites:
            energy_G = one.cost.square() if site == one.group.consumer else one.energies[site.name]
            left_W = (energy_G.double().cumsum(0) / energy_G.double().sum().clamp(min=1e-300)).cpu()[index_W - 1]
            tail_K = tail_energy(evidence.cost[site.name]).cpu()[1:]
            self._costs[site.name], self._losses[site.name] = _tables(one, site, self.widths, left_W, tail_K, budget)

    @staticmethod
    def widths_of(one: Channels, budget: Budget) -> range:
        """Return the widths that are looked at, rising; none where the least is all channels."""
        step = -(-one.group.channels // (MOST_WIDTHS * budget.multiple_of)) * budget.multiple_of
        return range(step, one.group.channels, step)

    def best(self, t: float) -> tuple[float, int, dict[str, int]]:
        """Return the least ``loss + t · cost``, the width that has it, and the candidate of each layer, by index."""
        values_W, places = self._losses_W.clone(), {}
        for name, costs_WK in self._costs.items():
            found = (self._losses[name] + t * costs_WK).min(dim=1)
            values_W += found.values
            places[name] = found.indices
        index = int(values_W.argmin())
        chosen = {name: min(int(place_W[index]), self._ranks(name, index)) for name, place_W in places.items()}
        return float(values_W[index]), index, chosen

    def table(self, site: str, index: int) -> Table:
        """Return the candidates of a layer at a width."""
        costs_K, losses_K, ranks = self._costs[site][index], self._losses[site][index], self._ranks(site, index)
        costs_K, losses_K = (torch.cat([one[:ranks], one[-1:]]) for one in (costs_K, losses_K))
        return Table(costs_K, losses_K, range(1, ranks + 1))

    def least(self) -> int:
        """Return the fewest parameters there may be."""
        return sum(int(costs_WK.min()) for costs_WK in self._costs.values())

    def _ranks(self, site: str, index: int) -> int:
        """Return how many ranks of a layer there are at a width."""
        return int(self._losses[site][index, :-1].isfinite().sum())


def _tables(
    one: Channels, site: "Site", widths: range, left_W: torch.Tensor, tail_K: torch.Tensor, budget: Budget
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return parameters and losses of every width and rank of a layer; the last is to have no rank, and loses nothing.

    Ranks that there are not, or that make nothing smaller, cost and lose infinitely much.

    Args:
        one: the group.
        site: the layer.
        widths: of the group.
        left_W: share of the layer's energy that every width leaves.
        tail_K: what rank 1, 2, ... of the whole layer loses.
        budget: what a rank costs.
    """
    shapes = [one.decisions(width)[site.name].shape(site.out_features, site.in_features) for width in widths]
    sides_W2 = torch.tensor(shapes, dtype=torch.float64)
    rank_K = torch.arange(1, len(tail_K) + 1, dtype=torch.float64)
    costs_WK = rank_K * sides_W2.sum(dim=1, keepdim=True) - (rank_K.square() if budget.pivoted else 0)
    dense_W1 = sides_W2.prod(dim=1, keepdim=True)
    fits_WK = (rank_K < sides_W2.min(dim=1, keepdim=True).values) & (costs_WK < dense_W1)
    losses_WK = torch.where(fits_WK, left_W[:, None] * tail_K, torch.inf)
    costs_WK = torch.where(fits_WK, costs_WK, torch.inf)
    return torch.cat([costs_WK, dense_W1], 1), torch.cat([losses_WK, torch.zeros_like(dense_W1)], 1)
