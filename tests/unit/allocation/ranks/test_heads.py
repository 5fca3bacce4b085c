"""Heads of attentions in the budget of ranks and widths."""

import pytest
import torch

from pared.allocation import Budget, Evidence, Unit, allocator_of
from pared.allocation.units import Channels
from pared.schema.plan import Dense, LowRank, SitePlan
from pared.schema.width import Width
from pared.structure.groups import ChannelGroup, Producer
from pared.structure.model import Site

HIDDEN, WIDTH, HEADS, BLOCKS = 8, 2, 4, 2  # of a key/value head, which two query heads read


def site(block: int, kind: str, out_features: int, in_features: int, has_bias: bool = False) -> Site:
    name = f"layers.{block}.{kind}"
    return Site(name, block, kind, out_features, in_features, has_bias, reads=name)


def problem(head_costs: tuple[float, ...] = (8, 4, 2, 1), rank_cost: float = 10.0) -> tuple[list[Unit], Evidence]:
    """Return a grouped attention and an MLP in every block; ranks cost as much as directions have."""
    units, costs, channels = [], {}, {}
    for block in range(BLOCKS):
        q, k, v = (site(block, kind, HEADS * rows, HIDDEN) for kind, rows in (("q", 4), ("k", 2), ("v", 2)))
        o, up, down = site(block, "o", HIDDEN, 16), site(block, "up", 12, HIDDEN), site(block, "down", HIDDEN, 12)
        for one in (q, k, v, o, up, down):
            units.append(Unit((one,)))
            costs[one.name] = torch.full((min(one.out_features, one.in_features),), rank_cost, dtype=torch.float64)
        heads = ChannelGroup(o, (Producer(q, 4), Producer(k, 2), Producer(v, 2)), 4, "head")
        each = torch.tensor(head_costs, dtype=torch.float64).repeat_interleave(4) / 2  # of the four inputs of a head
        channels[o.name] = Channels(heads, each * (1 + block))
        mlp = ChannelGroup(down, (Producer(up),))
        channels[down.name] = Channels(mlp, torch.full((12,), rank_cost, dtype=torch.float64))
    return units, Evidence(costs, channels=channels)


def decided(name: str, keep: float, structures: str = "mixed", multiple_of: int = 4, **given: object) -> dict:
    units, evidence = problem(**given)  # type: ignore[arg-type]
    budget = Budget(keep, pivoted=True, structures=structures, multiple_of=multiple_of)  # type: ignore[arg-type]
    found = allocator_of(name, "low_rank").allocate(units, budget, evidence)
    spent = sum(found[unit.name].parameters(unit.out_features, unit.in_features) for unit in units)
    assert spent <= keep * sum(unit.parameters for unit in units)
    return found


def test_a_head_has_the_parameters_of_all_its_layers():
    (_, evidence) = problem()
    group = evidence.channels["layers.0.o"].group
    assert group.parameters_each == (4 + 2 + 2) * HIDDEN + 4 * HIDDEN
    assert [site.name for site in group.sites] == [f"layers.0.{kind}" for kind in ("o", "q", "k", "v")]


@pytest.mark.parametrize("structures", ["widths", "mixed"])
def test_the_cheapest_heads_go_first_and_one_stays(structures: str):
    found = decided("loss", 0.8, structures)
    first, second = found["layers.0.o"], found["layers.1.o"]
    assert isinstance(first, Width)
    assert (first.side, first.rows, first.unit) == ("in", 4, "head")
    assert first.width >= 1
    assert not isinstance(second, Width) or second.width >= first.width  # its heads are worth twice as much
    layers = [found[f"layers.0.{kind}"] for kind in ("q", "k", "v")]
    assert [(one.side, one.rows, one.width, one.group) for one in layers] == [
        ("out", rows, first.width, "layers.0.o") for rows in (4, 2, 2)
    ]


def test_heads_that_cost_more_than_what_else_there_is_stay():
    found = decided("loss", 0.8, head_costs=(80, 80, 80, 80), rank_cost=0.1)
    assert any(isinstance(one, LowRank | Width) for one in found.values())
    assert not any(isinstance(one, Width) and one.unit == "head" for one in found.values())


def test_multiples_are_of_channels_alone():
    found = decided("loss", 0.7, "widths", multiple_of=4)
    assert {one.width for one in found.values() if isinstance(one, Width) and one.unit == "head"} - {4, 8, 12}
    assert all(one.width % 4 == 0 for one in found.values() if isinstance(one, Width) and one.unit == "channel")


def test_uniform_rounds_heads_and_gives_the_rest_to_the_others():
    found = decided("uniform", 0.7, "widths", multiple_of=1)
    assert {found[f"layers.{block}.o"].width for block in range(BLOCKS)} == {3}  # 0.7 of 4 is 2.8
    # (0.7 · (4 · 96 + 192) - 3 · 96) / 192 of 12 channels
    assert {found[f"layers.{block}.down"].width for block in range(BLOCKS)} == {7}
    kept = decided("uniform", 0.9, "widths", multiple_of=1)
    assert all(isinstance(kept[f"layers.0.{kind}"], Dense) for kind in ("q", "k", "v", "o"))


def test_a_layer_counts_what_stays_of_its_heads():
    reader = Width(group="o", side="in", width=3, channels=4, rows=4, unit="head")
    assert SitePlan(name="o", kind="o", block=0, out_features=8, in_features=16, decision=reader).after == 8 * 12
    value = Width(group="o", side="out", width=3, channels=4, rows=2, unit="head", has_bias=True)
    one = SitePlan(name="v", kind="v", block=0, out_features=8, in_features=8, decision=value)
    assert (one.after, one.biases_removed) == (8 * 6, 2)
    assert one.describe() == "v 8 x 8: 3 of 4 heads"
