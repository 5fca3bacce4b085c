"""Candidates of one unit in every form of few bits, where a budget is one of bytes."""

import torch

from pared.allocation.rank_budget import tail_energy
from pared.allocation.ranks.composed import Table
from pared.allocation.units import Budget, Evidence, Unit
from pared.schema.bits import FORMS, Form, stored_bytes


def ranks_in_forms(unit: Unit, budget: Budget, evidence: Evidence) -> Table:
    """Return rank 1, 2, ... and staying dense, each as the model has it and in every form whose price is known.

    What a rank leaves out and what rounding its factors costs are added up. Candidates that another one beats in bytes
    and loss are left out, so that losses fall as bytes rise.

    Args:
        unit: a single weight.
        budget: of bytes.
        evidence: the costs of ranks and of rounding.
    """
    known: list[Form | None] = [None, *(form for form in FORMS if form in evidence.rounding.get(unit.name, {}))]
    tails_K = tail_energy(evidence.cost[unit.name]).cpu()
    most = budget.most_rank(unit)
    costs, losses, sizes, forms = [], [], [], list[Form | None]()
    for form in known:
        price_K = tails_K.new_zeros(1) if form is None else evidence.rounding[unit.name][form].cpu()
        ranks = range(1, (most if form is None else min(most, len(price_K) - 1)) + 1)
        rounding_K = tails_K.new_zeros(len(ranks)) if form is None else price_K[1 : len(ranks) + 1]
        costs += [_bytes(unit, rank, form, budget.itemsize) for rank in (*ranks, 0)]
        losses.append(torch.cat([tails_K[1 : len(ranks) + 1] + rounding_K, price_K[:1]]))
        sizes += [*ranks, 0]
        forms += [form] * (len(ranks) + 1)
    cost_C, loss_C = torch.tensor(costs, dtype=torch.float64), torch.cat(losses)
    order_C = _unbeaten(cost_C, loss_C)
    chosen = order_C.tolist()
    return Table(cost_C[order_C], loss_C[order_C], [sizes[one] for one in chosen], [forms[one] for one in chosen])


def _bytes(unit: Unit, rank: int, form: Form | None, itemsize: int) -> int:
    """Return the bytes of a rank, of the dense weight for 0."""
    shapes = [(unit.out_features, rank), (rank, unit.in_features)] if rank else unit.shapes
    return sum(stored_bytes(form, m, n, itemsize) for m, n in shapes)


def _unbeaten(cost_C: torch.Tensor, loss_C: torch.Tensor) -> torch.Tensor:
    """Return the candidates that lose less than every cheaper one, by rising cost."""
    by_loss_C = loss_C.argsort(stable=True)
    order_C = by_loss_C[cost_C[by_loss_C].argsort(stable=True)]
    least_C = loss_C[order_C].cummin(0).values
    before_C = torch.cat([least_C.new_tensor([torch.inf]), least_C[:-1]])
    return order_C[loss_C[order_C] < before_C]
