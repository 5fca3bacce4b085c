"""A width of a channel group, and ranks of what it leaves, in one budget."""

from dataclasses import replace

import pytest
import torch

from pared import ParedError
from pared.allocation import Budget, Evidence, Unit, allocator_of
from pared.allocation.units import Channels
from pared.schema.plan import Dense, LowRank, SitePlan
from pared.schema.width import Width
from pared.structure.groups import ChannelGroup, Producer
from pared.structure.model import Site

HIDDEN, WIDE = 12, 24


def site(kind: str, out_features: int, in_features: int) -> Site:
    return Site(f"0.{kind}", 0, kind, out_features, in_features, False, reads=f"0.{kind}")


def problem(steepness: float = 0.2) -> tuple[list[Unit], Evidence]:
    """Return one gated MLP whose spectra and channels fall off alike, so that a little of each loses least."""
    gate, up, down = site("gate", WIDE, HIDDEN), site("up", WIDE, HIDDEN), site("down", HIDDEN, WIDE)
    group = ChannelGroup(down, (Producer(gate), Producer(up)))
    falling = torch.exp(-steepness * torch.arange(HIDDEN, dtype=torch.float64))
    channels = 1.8 * torch.exp(-steepness / 2 * torch.arange(WIDE, dtype=torch.float64))
    energies = {one.name: channels.square() for one in (gate, up)}
    costs = dict.fromkeys((gate.name, up.name, down.name), falling)
    units = [Unit((one,)) for one in (gate, up, down)]
    return units, Evidence(costs, channels={down.name: Channels(group, channels, energies=energies)})


def budget(keep: float, pivoted: bool = True) -> Budget:
    return Budget(keep, pivoted=pivoted, structures="mixed", multiple_of=2)


def lost(evidence: Evidence, decisions: dict) -> float:
    """Return what decisions lose as the allocation prices them."""
    total = 0.0
    (one,) = evidence.channels.values()
    for name, decision in decisions.items():
        share = 1.0
        if isinstance(decision, Width):
            energy = one.cost.square() if name == "0.down" else one.energies[name]
            share = float(energy[: decision.width].sum() / energy.sum())
            total += float(one.cost[decision.width :].square().sum()) if decision.side == "in" else 0.0
        rank = getattr(decision, "rank", None)
        total += 0.0 if rank is None else share * float(evidence.cost[name][rank:].square().sum())
    return total


def spent(units: list[Unit], decisions: dict) -> int:
    return sum(decisions[unit.name].parameters(unit.out_features, unit.in_features) for unit in units)


@pytest.mark.parametrize("pivoted", [True, False])
@pytest.mark.parametrize("keep", [0.4, 0.55, 0.7, 0.85])
def test_width_and_ranks_together_lose_no_more_than_either(keep: float, pivoted: bool):
    units, evidence = problem()
    allocate = allocator_of("loss", "low_rank").allocate
    (name,) = evidence.channels
    without = replace(evidence, channels={name: replace(evidence.channels[name], energies={})})
    found, apart = (allocate(units, budget(keep, pivoted), one) for one in (evidence, without))
    total = sum(unit.parameters for unit in units)
    assert spent(units, found) <= keep * total
    assert lost(evidence, found) <= lost(evidence, apart) * (1 + 1e-9)


def test_what_is_left_of_a_narrower_layer_may_have_a_rank():
    units, evidence = problem()
    found = allocator_of("loss", "low_rank").allocate(units, budget(0.55), evidence)
    assert all(isinstance(one, Width) for one in found.values())
    assert {one.width for one in found.values()} == {found["0.down"].width}
    assert found["0.down"].width % 2 == 0
    ranked = [one for one in found.values() if one.rank is not None]
    assert ranked
    for unit in units:
        decision = found[unit.name]
        SitePlan(name=unit.name, kind=unit.kind, block=0, out_features=unit.out_features,
                 in_features=unit.in_features, decision=decision)  # fmt: skip
        m, n = decision.shape(unit.out_features, unit.in_features)
        assert decision.rank is None or decision.parameters(unit.out_features, unit.in_features) < m * n
    allocate = allocator_of("loss", "low_rank").allocate
    alone = min(
        lost(evidence, allocate(units, Budget(0.55, True, structures=structures, multiple_of=2), evidence))
        for structures in ("ranks", "widths")
    )
    assert lost(evidence, found) < 0.95 * alone


def test_without_energies_nothing_is_composed():
    units, evidence = problem()
    (name,) = evidence.channels
    evidence = replace(evidence, channels={name: replace(evidence.channels[name], energies={})})
    found = allocator_of("loss", "low_rank").allocate(units, budget(0.55), evidence)
    assert all(getattr(one, "rank", None) is None for one in found.values() if isinstance(one, Width))
    assert {type(one) for one in found.values()} <= {Width, LowRank, Dense}


def test_a_rank_of_what_is_left_is_counted_and_must_exist():
    width = Width(group="0.down", side="out", width=10, channels=WIDE).ranked(3, pivoted=True)
    one = SitePlan(name="up", kind="up", block=0, out_features=WIDE, in_features=HIDDEN, decision=width)
    assert one.after == 3 * (10 + HIDDEN) - 9
    assert one.index_bytes == 4 * HIDDEN
    assert one.describe() == "up 24 x 12: width 10 of 24, rank 3, pivoted"
    assert width.ranked(3, pivoted=False).parameters(WIDE, HIDDEN) == 3 * (10 + HIDDEN)
    with pytest.raises(ParedError, match="does not fit a 24 x 12 weight"):
        SitePlan(name="up", kind="up", block=0, out_features=WIDE, in_features=HIDDEN,
                 decision=width.ranked(11, pivoted=True))  # fmt: skip
