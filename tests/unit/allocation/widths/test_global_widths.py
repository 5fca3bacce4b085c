"""One threshold over standardised scores: which channels stay, by hand."""

import pytest
import torch

from pared import ParedError
from pared.allocation import Budget, Evidence, Unit, allocator_of
from pared.allocation.units import Channels
from pared.allocation.widths.global_widths import standardised
from pared.schema.plan import Dense
from pared.schema.width import Width
from pared.structure import Site
from pared.structure.groups import ChannelGroup, Producer

HIDDEN = 4


def site(name: str, out: int, width: int, block: int = 0) -> Site:
    return Site(name, block, name, out, width, has_bias=False, reads=name)


def channels(name: str, scores: list[float], inputs: int = 1, rows: int = 1) -> Channels:
    """Return a group of one maker with given scores, falling, of every input."""
    width = len(scores)
    group = ChannelGroup(
        site(f"{name}.down", HIDDEN, width), (Producer(site(f"{name}.up", rows * width // inputs, HIDDEN), rows),),
        inputs, "channel" if inputs == 1 else "head",
    )  # fmt: skip
    return Channels(group, torch.tensor(scores, dtype=torch.float64).sqrt())


def decided(keep: float, *groups: Channels, multiple_of: int = 1) -> dict[str, object]:
    units = [Unit((one,)) for group in groups for one in group.group.sites]
    evidence = Evidence(channels={one.group.name: one for one in groups})
    budget = Budget(keep, structures="widths", multiple_of=multiple_of)
    return dict(allocator_of("global", "low_rank").allocate(units, budget, evidence))


def widths(keep: float, *groups: Channels, multiple_of: int = 1) -> list[int]:
    found = decided(keep, *groups, multiple_of=multiple_of)
    return [one.width if isinstance(one := found[group.group.name], Width) else group.group.channels
            for group in groups]  # fmt: skip


def test_scores_are_standardised_within_a_group():
    one = channels("a", [9.0, 4.0, 1.0, 0.0])
    values = torch.tensor([9.0, 4.0, 1.0, 0.0], dtype=torch.float64)
    assert torch.allclose(standardised(one), (values - values.mean()) / values.std())
    heads = channels("b", [9.0, 4.0, 1.0, 0.0], inputs=2, rows=2)
    assert torch.allclose(standardised(heads), ((values - values.mean()) / values.std()).view(2, 2).mean(dim=1))
    assert torch.equal(standardised(channels("c", [2.0, 2.0])), torch.zeros(2, dtype=torch.float64))


def test_the_largest_scores_of_all_groups_stay():
    """Six of eight channels: those of the flat group beside the two that stand out of the other."""
    flat, steep = channels("a", [4.0, 3.0, 2.0, 1.0]), channels("b", [100.0, 3.0, 2.0, 1.0])
    z = torch.cat([standardised(flat), standardised(steep)])
    for count in range(2, 8):
        threshold = z.sort(descending=True).values[count - 1]
        expected = [int((standardised(one) >= threshold).sum()) for one in (flat, steep)]
        assert widths(count / 8, flat, steep) == [max(1, one) for one in expected]


def test_what_all_scores_of_a_group_are_multiplied_by_changes_nothing():
    flat, steep = channels("a", [4.0, 3.0, 2.0, 1.0]), channels("b", [1e4, 300.0, 200.0, 100.0])
    assert widths(0.75, flat, steep) == widths(0.75, flat, channels("b", [100.0, 3.0, 2.0, 1.0]))


def test_widths_are_multiples_and_the_budget_is_kept():
    drawn = torch.rand(3, 24, generator=torch.Generator().manual_seed(0)).sort(dim=1, descending=True).values
    groups = [channels(name, scores.tolist()) for name, scores in zip("abc", drawn, strict=True)]
    for keep in (0.34, 0.5, 0.62, 0.9):
        found = widths(keep, *groups, multiple_of=8)
        assert all(width % 8 == 0 for width in found)
        assert sum(found) == 8 * int(keep * 9)


def test_a_head_costs_what_its_parameters_are():
    """A head of two inputs and two rows is worth two channels, and either is taken by its own score alone."""
    heads = channels("a", [9.0, 9.0, 1.0, 1.0], inputs=2, rows=2)
    mlp = channels("b", [5.0, 4.0, 3.0, 2.0])
    assert heads.group.parameters_each == 2 * mlp.group.parameters_each
    assert widths(0.5, heads, mlp) == [1, 2]


def test_everything_is_kept_at_keep_one():
    assert all(isinstance(one, Dense) for one in decided(1.0, channels("a", [2.0, 1.0])).values())


def test_less_than_a_step_of_every_group_is_refused():
    with pytest.raises(ParedError, match=r"keep 0\.2 cannot be reached by widths of 2 channel groups alone"):
        decided(0.2, channels("a", [4.0, 3.0, 2.0, 1.0]), channels("b", [4.0, 3.0, 2.0, 1.0]))
