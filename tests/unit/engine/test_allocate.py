"""Plans are data that add up, and the uniform allocation never spends more than it was given."""

import random
from itertools import pairwise
from typing import Any

import pytest

from pared.allocation import Budget, Evidence, Unit, allocator_of
from pared.allocation.ranks.uniform import uniform
from pared.engine.allocate import make_plan
from pared.errors import ParedError
from pared.schema.plan import NM, Dense, LowRank, Plan, SitePlan, Sparse, Uncovered
from pared.structure.model import Anatomy, Site


def site(name: str, out_features: int, in_features: int, idle: bool = False) -> Site:
    return Site(name, 0, "q", out_features, in_features, has_bias=False, reads=name, idle=idle)


def planned(*sites: Site, keep: float, uncovered: tuple[Uncovered, ...] = (), elsewhere: int = 1000) -> Plan:
    weights = sum(one.out_features * one.in_features for one in sites) + sum(one.parameters for one in uncovered)
    anatomy = Anatomy("model.layers", tuple(sites), uncovered, (), weights + elsewhere)
    return make_plan(anatomy, allocator_of("uniform", "low_rank"), Budget(keep), bytes_per_parameter=2)


def ranks(plan: Plan) -> list[int | None]:
    return [one.decision.rank if isinstance(one.decision, LowRank) else None for one in plan.sites]


def covered(plan: Plan) -> int:
    return plan.after.covered_parameters


EXPERTS = Uncovered(name="experts", shape=(4, 10, 20), parameters=800, reason="a 3-D stack of expert weights")


def test_costs_are_those_of_the_stored_factors():
    assert LowRank(rank=7).parameters(30, 50) == 7 * 30 + 7 * 50
    assert Dense(reason="any").parameters(30, 50) == 1500


def test_three_sizes_add_up():
    plan = planned(site("a", 40, 60), site("b", 30, 20), keep=0.5, uncovered=(EXPERTS,))
    assert ranks(plan) == [12, 6]
    assert plan.before.covered_parameters == 2400 + 600
    assert plan.after.covered_parameters == 12 * 100 + 6 * 50
    assert plan.before.model_parameters == 3000 + 800 + 1000
    assert plan.after.model_parameters == 1500 + 800 + 1000
    assert plan.before.bytes_on_disk == 2 * 4800
    assert plan.after.bytes_on_disk == 2 * 3300
    assert plan.achieved_keep == 0.5
    assert plan.uncovered_share == pytest.approx(800 / 3800)
    assert plan.shortfall == 0


def test_plan_survives_json():
    plan = planned(site("a", 40, 60), site("b", 30, 20, idle=True), keep=0.7, uncovered=(EXPERTS,))
    assert {type(one.decision) for one in plan.sites} == {LowRank, Dense}
    again = Plan.model_validate_json(plan.model_dump_json())
    assert again == plan
    assert again.after == plan.after


@pytest.mark.parametrize(
    "change",
    [{"sparsity": 0.5}, {"sites": [{"name": "a"}]}, {"keep": "much"}],
    ids=["unknown key", "half a site", "not a number"],
)
def test_edited_plan_that_makes_no_sense_is_refused(change: dict[str, object]):
    fields = planned(site("a", 40, 60), keep=0.7).model_dump(mode="json")
    with pytest.raises(ParedError):
        Plan.model_validate({**fields, **change})


@pytest.mark.parametrize("rank", [0, -1])
def test_rank_below_one_is_no_decision(rank: int):
    with pytest.raises(ParedError):
        LowRank(rank=rank)


def test_unknown_kind_of_decision_is_refused():
    fields = planned(site("a", 40, 60), keep=0.7).sites[0].model_dump(mode="json")
    with pytest.raises(ParedError, match="decision"):
        SitePlan.model_validate({**fields, "decision": {"kind": "low_rnk", "rank": 3}})


def test_budget_is_never_exceeded_nor_wasted():
    draw = random.Random(0)
    for _ in range(300):
        sites = [site(f"s{index}", draw.randint(20, 300), draw.randint(20, 300)) for index in range(6)]
        keep = draw.uniform(0.15, 0.999)
        plan = planned(*sites, keep=keep)
        assert covered(plan) <= keep * plan.before.covered_parameters + 1e-6
        assert plan.shortfall == 0
        for one in plan.sites:
            assert one.after <= keep * one.before + 1e-6
            assert one.after + one.out_features + one.in_features > keep * one.before - 1e-6  # one more is too much


def test_budget_that_is_met_exactly_reports_no_shortfall():
    """0.29 of 100 parameters is 28.999999999999996 in floating point; rank 1 of 4 x 25 costs 29."""
    plan = planned(site("a", 4, 25), keep=0.29)
    assert ranks(plan) == [1]
    assert covered(plan) == 29
    assert plan.shortfall == 0


def test_one_parameter_too_many_is_a_shortfall():
    plan = planned(site("a", 4, 25), keep=0.29).model_copy(update={"keep": 0.28})
    assert plan.shortfall == 1


def test_uniform_gives_equal_shapes_equal_ranks():
    plan = planned(site("a", 48, 96), site("b", 96, 48), site("c", 48, 96), keep=0.6)
    assert ranks(plan) == [19, 19, 19]


def test_larger_keep_never_gives_a_smaller_rank():
    sites = [site("a", 48, 96), site("b", 64, 64)]
    by_keep = [ranks(planned(*sites, keep=keep / 100)) for keep in range(5, 100)]
    assert all(low <= high for a, b in pairwise(by_keep) for low, high in zip(a, b, strict=True))


def test_no_site_is_made_larger_than_it_was():
    for keep in (0.9, 0.99, 0.999999, 1 - 1e-12):
        plan = planned(site("a", 40, 60), site("b", 20, 20), keep=keep)
        assert all(one.after <= one.before for one in plan.sites)


def test_idle_sites_stay_dense_and_the_others_meet_the_budget():
    plan = planned(site("a", 100, 100), site("b", 50, 40, idle=True), site("c", 100, 100), keep=0.7)
    assert isinstance(plan.sites[1].decision, Dense)
    assert "never ran in the probe pass" in plan.sites[1].decision.reason
    assert ranks(plan) == [33, None, 33]  # (0.7 · 22000 - 2000) / 20000 = 0.67 of each of the others
    assert covered(plan) <= 0.7 * 22000
    assert plan.shortfall == 0


def test_budget_that_idle_sites_alone_use_up_is_a_shortfall():
    plan = planned(site("a", 100, 100), site("b", 100, 100, idle=True), keep=0.4)
    assert ranks(plan) == [1, None]
    assert plan.shortfall == 10000 + 200 - 8000


def test_model_of_idle_sites_only_is_all_shortfall():
    plan = planned(site("a", 10, 10, idle=True), keep=0.5)
    assert ranks(plan) == [None]
    assert plan.shortfall == 50


@pytest.mark.parametrize("shape", [(1, 60), (60, 1)])
def test_single_row_or_column_stays_dense_and_is_paid_for(shape: tuple[int, int]):
    plan = planned(site("router", *shape), site("b", 60, 60), keep=0.5)
    assert isinstance(plan.sites[0].decision, Dense)
    assert "no fewer parameters" in plan.sites[0].decision.reason
    assert covered(plan) <= 0.5 * 3660
    assert plan.shortfall == 0


def test_keep_1_leaves_everything_dense():
    plan = planned(site("a", 40, 60), site("b", 60, 40, idle=True), keep=1.0)
    assert [one.decision for one in plan.sites] == [Dense(reason="everything is kept")] * 2
    assert plan.after == plan.before
    assert plan.achieved_keep == 1
    assert plan.shortfall == 0


def test_keep_too_small_for_a_rank_names_the_site():
    with pytest.raises(ParedError, match=r"keep 0.01 leaves no rank for model\.layers\.3\.k 48 x 96"):
        planned(site("model.layers.3.q", 500, 500), site("model.layers.3.k", 48, 96), keep=0.01)


@pytest.mark.parametrize("shape", [(100, 48), (7, 3), (64, 576), (30, 29)])
def test_the_least_keep_that_is_told_is_enough(shape: tuple[int, int]):
    """It was once rounded down, so that doing as told failed again with the same message."""
    small, large = site("small", *shape), site("large", 700, 900)
    with pytest.raises(ParedError) as told:
        planned(large, small, keep=0.0011)
    least = float(str(told.value).split()[-1])
    assert min(rank or 1 for rank in ranks(planned(large, small, keep=least))) == 1
    if least < 1:
        assert ranks(planned(small, keep=least)) == [1]


def test_order_of_the_sites_is_kept():
    names = ["c", "a", "b"]
    decisions = uniform([Unit((site(name, 40, 40, idle=name == "a"),)) for name in names], Budget(0.5), Evidence())
    assert list(decisions) == names


def test_unknown_allocation_suggests_the_nearest():
    with pytest.raises(ParedError, match="unknown allocation 'unifrom'; did you mean 'uniform'"):
        allocator_of("unifrom", "low_rank")


def test_a_rank_above_what_the_weight_has_is_refused():
    with pytest.raises(ParedError, match="rank 5, but a 4 x 9 weight has at most 4"):
        SitePlan(name="q", kind="q", block=0, out_features=4, in_features=9, decision=LowRank(rank=5))


@pytest.mark.parametrize(
    ("decisions", "keep", "told"),
    [
        ([Sparse(sparsity=0.5), Sparse(sparsity=0.5)], 0.5, "every row keeps a whole number of weights"),
        ([Dense(reason="never ran"), Sparse(sparsity=0.5)], 0.5, "1 sites stay dense, the first is a"),
        ([Dense(reason="no gain"), LowRank(rank=1)], 0.1, "1 sites stay dense"),
        ([LowRank(rank=1), LowRank(rank=1)], 0.01, "a rank is a whole number, and at least 1"),
        ([NM(kept=3, group=7), NM(kept=3, group=7)], 0.4, "every group keeps a whole number of weights"),
        ([LowRank(rank=1), LowRank(rank=1)], 0.9, None),
    ],
)
def test_a_missed_budget_tells_why_and_rounding_is_not_taken_for_dense_sites(
    decisions: list[Any], keep: float, told: str | None
):
    sites = [SitePlan(name=name, kind="q", block=0, out_features=8, in_features=7, decision=decision)
             for name, decision in zip("ab", decisions, strict=True)]  # fmt: skip
    plan = Plan(keep=keep, sites=tuple(sites), model_parameters=500, bytes_per_parameter=4)
    if told is None:
        assert (plan.missed, plan.shortfall) == (None, 0)
        return
    assert plan.missed is not None
    assert plan.missed.startswith(f"the budget is missed by {plan.shortfall:,} parameters, ")
    assert told in plan.missed
    assert ("stay dense" in plan.missed) == any(isinstance(one, Dense) for one in decisions)
