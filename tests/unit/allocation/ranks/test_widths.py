"""Widths of channel groups in the budget of ranks: by loss and uniform."""

from dataclasses import replace
from itertools import product

import pytest
import torch

from pared import ParedError
from pared.allocation import Budget, Evidence, Unit, allocator_of
from pared.allocation.units import Channels
from pared.schema.plan import Dense, LowRank, SitePlan
from pared.schema.width import Width, channels_of, ranges_of
from pared.structure.groups import ChannelGroup, Producer
from pared.structure.model import Site

HIDDEN, WIDE, BLOCKS = 8, 12, 3


def site(block: int, kind: str, out_features: int, in_features: int, has_bias: bool = False) -> Site:
    name = f"layers.{block}.{kind}"
    return Site(name, block, kind, out_features, in_features, has_bias, reads=name)


def draw(size: int, seed: int, scale: float) -> torch.Tensor:
    values = torch.rand(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (scale * values).sort(descending=True).values


def problem(scale: float = 1.0, width_scale: float = 1.0) -> tuple[list[Unit], Evidence]:
    """Return an attention output and a gated MLP in every block, with random spectra."""
    units, costs, channels = [], {}, {}
    for block in range(BLOCKS):
        o, gate, up = site(block, "o", HIDDEN, HIDDEN), *(site(block, kind, WIDE, HIDDEN) for kind in ("gate", "up"))
        down = site(block, "down", HIDDEN, WIDE)
        group = ChannelGroup(down, (Producer(gate), Producer(up)))
        for number, one in enumerate((o, gate, up, down)):
            units.append(Unit((one,)))
            costs[one.name] = draw(HIDDEN, 10 * block + number, scale * (1 + block))
        channels[down.name] = Channels(group, draw(WIDE, 10 * block + 7, width_scale * (1 + block)))
    return units, Evidence(costs, channels=channels)


def budget(keep: float, structures: str = "mixed", multiple_of: int = 1) -> Budget:
    return Budget(keep, pivoted=True, structures=structures, multiple_of=multiple_of)  # type: ignore[arg-type]


def parameters(units: list[Unit], decisions: dict) -> int:
    return sum(decisions[unit.name].parameters(unit.out_features, unit.in_features) for unit in units)


def total(units: list[Unit]) -> int:
    return sum(unit.parameters for unit in units)


def expected_loss(units: list[Unit], evidence: Evidence, decisions: dict) -> float:
    lost = 0.0
    for unit in units:
        decision = decisions[unit.name]
        if isinstance(decision, LowRank):
            lost += float(evidence.cost[unit.name][decision.rank :].square().sum())
        elif isinstance(decision, Width) and decision.side == "in":
            lost += float(evidence.channels[unit.name].cost[decision.width :].square().sum())
    return lost


@pytest.mark.parametrize("structures", ["ranks", "widths", "mixed"])
@pytest.mark.parametrize("keep", [0.5, 0.7, 0.9])
def test_the_budget_is_met_and_never_exceeded(structures: str, keep: float):
    units, evidence = problem()
    decisions = allocator_of("loss", "low_rank").allocate(units, budget(keep, structures), evidence)
    spent = parameters(units, decisions)
    assert keep * total(units) - 40 < spent <= keep * total(units)


def test_mixed_is_never_worse_than_either_alone():
    for seed in range(4):
        units, evidence = problem(width_scale=0.6 + 0.2 * seed)
        by = {
            structures: expected_loss(
                units, evidence, allocator_of("loss", "low_rank").allocate(units, budget(0.7, structures), evidence)
            )
            for structures in ("ranks", "widths", "mixed")
        }
        assert by["mixed"] <= min(by["ranks"], by["widths"]) * (1 + 1e-9)


def test_a_group_is_decided_as_a_whole_or_not_at_all():
    units, evidence = problem(width_scale=0.8)
    decisions = allocator_of("loss", "low_rank").allocate(units, budget(0.65), evidence)
    kinds = set()
    for name, one in evidence.channels.items():
        own = [decisions[site.name] for site in one.group.sites]
        narrow = [isinstance(decision, Width) for decision in own]
        assert all(narrow) or not any(narrow)
        kinds.add(all(narrow))
        if all(narrow):
            assert {(decision.width, decision.group) for decision in own} == {(own[0].width, name)}
            assert [decision.side for decision in own] == ["in", "out", "out"]
    assert True in kinds


def test_channels_that_cost_nothing_go_first():
    units, evidence = problem()
    name = "layers.1.down"
    free = evidence.channels[name].cost.clone()
    free[5:] = 0
    evidence = replace(evidence, channels={**evidence.channels, name: Channels(evidence.channels[name].group, free)})
    decisions = allocator_of("loss", "low_rank").allocate(units, budget(0.9), evidence)
    assert decisions[name].width == 5


def test_widths_alone_leave_everything_else_dense():
    units, evidence = problem()
    decisions = allocator_of("loss", "low_rank").allocate(units, budget(0.7, "widths", 2), evidence)
    assert all(isinstance(decisions[f"layers.{block}.o"], Dense) for block in range(BLOCKS))
    widths = [decisions[name].width for name in evidence.channels if isinstance(decisions[name], Width)]
    assert widths
    assert all(width % 2 == 0 for width in widths)


def test_the_hull_is_the_best_there_is_among_its_own_sizes():
    """Every other choice of widths that costs no more loses no less, up to the step that rounding leaves."""
    units, evidence = problem()
    chosen = allocator_of("loss", "low_rank").allocate(units, budget(0.7, "widths"), evidence)
    spent, lost = parameters(units, chosen), expected_loss(units, evidence, chosen)
    names = list(evidence.channels)
    fixed = BLOCKS * HIDDEN * HIDDEN
    best = min(
        sum(float(evidence.channels[name].cost[width:].square().sum()) for name, width in zip(names, some, strict=True))
        for some in product(range(1, WIDE + 1), repeat=BLOCKS)
        if fixed + 3 * HIDDEN * sum(some) <= spent
    )
    assert lost == pytest.approx(best)


def test_without_ranks_or_widths_that_are_small_enough_the_error_says_what_is():
    units, evidence = problem()
    with pytest.raises(ParedError, match=r"keep 0.2 cannot be reached by widths of 3 channel groups alone") as raised:
        allocator_of("loss", "low_rank").allocate(units, budget(0.2, "widths", 4), evidence)
    least = float(str(raised.value).partition("the least is ")[2].split(",")[0])
    decisions = allocator_of("loss", "low_rank").allocate(units, budget(least, "widths", 4), evidence)
    assert {decisions[name].width for name in evidence.channels} == {4}
    with pytest.raises(ParedError, match="no channels were found"):
        allocator_of("loss", "low_rank").allocate(units, budget(0.7, "widths"), replace(evidence, channels={}))


def test_uniform_widths_are_one_width():
    units, evidence = problem()
    decisions = allocator_of("uniform", "low_rank").allocate(units, budget(0.7, "widths", 2), evidence)
    assert {decisions[name].width for name in evidence.channels} == {6}  # (0.7 · 352 - 64) / 288 · 12 = 7.6
    assert all(isinstance(decisions[f"layers.{block}.o"], Dense) for block in range(BLOCKS))
    mixed = allocator_of("uniform", "low_rank").allocate(units, budget(0.7, "mixed"), evidence)
    assert {mixed[name].width for name in evidence.channels} == {8}
    assert all(isinstance(mixed[f"layers.{block}.o"], LowRank) for block in range(BLOCKS))


def test_uniform_widths_that_cannot_be_are_an_error():
    units, evidence = problem()
    with pytest.raises(ParedError, match="12 channels, and widths are multiples of 64"):
        allocator_of("uniform", "low_rank").allocate(units, budget(0.7, "mixed", 64), evidence)


def test_without_widths_in_the_budget_nothing_changes():
    units, evidence = problem()
    for name in ("loss", "uniform"):
        plain = allocator_of(name, "low_rank").allocate(units, Budget(0.7, True), Evidence(evidence.cost))
        assert plain == allocator_of(name, "low_rank").allocate(units, budget(0.7), replace(evidence, channels={}))


def test_a_site_counts_what_stays_of_it():
    width = Width(group="down", side="out", width=5, channels=12, rows=2, has_bias=True)
    one = SitePlan(name="up", kind="up", block=0, out_features=24, in_features=8, decision=width)
    assert (one.after, one.biases_removed) == (2 * 5 * 8, 2 * 7)
    assert one.describe() == "up 24 x 8: width 5 of 12"
    reader = width.model_copy(update={"side": "in", "rows": 1})
    assert SitePlan(name="d", kind="d", block=0, out_features=8, in_features=12, decision=reader).after == 40
    with pytest.raises(ParedError, match="does not fit a 23 x 8 weight"):
        SitePlan(name="up", kind="up", block=0, out_features=23, in_features=8, decision=width)


def test_channels_are_written_in_ranges():
    assert ranges_of([0, 1, 2, 5, 7, 8]) == "0-2,5,7-8"
    assert channels_of("0-2,5,7-8") == [0, 1, 2, 5, 7, 8]
    assert channels_of(ranges_of([])) == []
    with pytest.raises(ParedError, match="expected rising ranges"):
        Width(group="d", side="in", width=1, channels=2, kept="all")
