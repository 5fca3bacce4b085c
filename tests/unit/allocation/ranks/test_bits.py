"""Bits, ranks and dense weights in one budget of bytes."""

import itertools

import pytest
import torch

from pared import ParedError
from pared.allocation import Budget, Evidence, Unit, allocator_of
from pared.allocation.ranks.forms import ranks_in_forms
from pared.schema.bits import LAYOUTS, stored_bytes
from pared.schema.plan import Decision, Dense, LowRank
from pared.structure.model import Site

SIDE, ITEMSIZE = 64, 2
FORMS = (None, *LAYOUTS)


def units(count: int = 3) -> list[Unit]:
    return [Unit((Site(f"{n}.q", n, "q", SIDE, SIDE, False, reads=f"{n}.q"),)) for n in range(count)]


def evidence(count: int = 3, steepness: float = 0.15) -> Evidence:
    """Return weights of rising importance, whose rounding to int4 costs sixteen squared times that to int8."""
    cost, rounding = {}, {}
    for n in range(count):
        falling = (n + 1) * torch.exp(-steepness * torch.arange(SIDE, dtype=torch.float64))
        cost[f"{n}.q"] = falling
        each = falling.square() * 3e-6
        price = torch.cat([each.sum()[None] * 2, each.cumsum(0)])
        rounding[f"{n}.q"] = {"int8": price, "int4": 256 * price}
    return Evidence(cost, rounding=rounding)


def budget(keep: float) -> Budget:
    return Budget(keep, itemsize=ITEMSIZE)


def allocate(keep: float, known: Evidence, count: int = 3) -> dict[str, Decision]:
    return allocator_of("loss", "low_rank").allocate(units(count), budget(keep), known)


def spent(decisions: dict[str, Decision]) -> int:
    return sum(one.stored_bytes(SIDE, SIDE, ITEMSIZE) for one in decisions.values())  # type: ignore[union-attr]


def lost(decisions: dict[str, Decision], known: Evidence) -> float:
    total = 0.0
    for name, one in decisions.items():
        rank = one.rank if isinstance(one, LowRank) else 0
        form = one.quantized  # type: ignore[union-attr]
        total += float(known.cost[name][rank:].square().sum()) if rank else 0.0
        total += float(known.rounding[name][form][rank]) if form else 0.0
    return total


def test_a_budget_of_all_bytes_keeps_everything_as_it_is() -> None:
    for one in allocate(1.0, evidence()).values():
        assert isinstance(one, Dense)
        assert one.quantized is None


@pytest.mark.parametrize("keep", [0.1, 0.2, 0.3, 0.45, 0.6, 0.8])
def test_the_bytes_of_a_budget_are_kept_to_and_no_uniform_choice_of_as_many_loses_less(keep: float) -> None:
    known, decisions = evidence(), allocate(keep, evidence())
    limit = keep * 3 * SIDE * SIDE * ITEMSIZE
    assert spent(decisions) <= limit
    for rank, form in itertools.product(range(SIDE // 2), FORMS):
        decided = LowRank(rank=rank, quantized=form) if rank else Dense(reason="", quantized=form)
        uniform: dict[str, Decision] = dict.fromkeys(known.cost, decided)
        if spent(uniform) <= limit:
            assert lost(decisions, known) <= lost(uniform, known) * (1 + 1e-9)


def test_more_bytes_never_lose_more() -> None:
    known = evidence()
    losses = [lost(allocate(keep, known), known) for keep in (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)]
    assert losses == sorted(losses, reverse=True)


def test_a_mixture_of_forms_is_chosen_where_it_loses_less() -> None:
    forms = {one.quantized for one in allocate(0.4, evidence()).values()}  # type: ignore[union-attr]
    assert len(forms) > 1


def test_of_a_weight_whose_rounding_is_not_priced_only_ranks_are_decided() -> None:
    known = Evidence(evidence().cost)
    assert {one.quantized for one in allocate(0.5, known).values()} == {None}  # type: ignore[union-attr]


def test_candidates_rise_in_bytes_and_fall_in_loss_and_are_priced_as_they_are_stored() -> None:
    known, (unit, *_) = evidence(), units()
    table = ranks_in_forms(unit, budget(0.5), known)
    assert bool((table.costs.diff() > 0).all())
    assert bool((table.losses.diff() < 0).all())
    for index, (cost, loss) in enumerate(zip(table.costs.tolist(), table.losses.tolist(), strict=True)):
        rank, form = table.size(index), table.form(index)
        shapes = [(SIDE, rank), (rank, SIDE)] if rank else [(SIDE, SIDE)]
        assert cost == sum(stored_bytes(form, *shape, ITEMSIZE) for shape in shapes)
        decision = LowRank(rank=rank, quantized=form) if rank else Dense(reason="", quantized=form)
        assert loss == pytest.approx(lost({unit.name: decision}, known))


def test_a_budget_that_buys_no_rank_says_how_many_bytes_it_takes() -> None:
    with pytest.raises(ParedError, match="bytes does not buy one rank"):
        allocate(0.001, evidence())
