"""Statistics added up over ranks are those of one process that saw all of the text."""

from pathlib import Path

import pytest
import torch
from processes import run_ranks
from torch import distributed

from pared import ParedError
from pared.calibration import statistic_kind
from pared.calibration.statistics import STATISTICS, Statistic, all_reduce

CPU = torch.device("cpu")
OUT, IN, BATCHES, EXAMPLES = 4, 70, 7, 3  # the batches do not divide evenly among ranks
NAMES = (*STATISTICS, "fisher:2", "fisher:3")
SITES = ("block.q", "block.k", "block.expert", "block.idle")  # q and k read one tensor


def empty(names: tuple[str, ...] = NAMES, inputs: int = IN) -> dict[str, dict[str, Statistic]]:
    def make(name: str) -> Statistic:
        kind = statistic_kind(name)
        return kind.accumulator(kind.features(OUT, inputs), CPU)

    made = {site: {name: make(name) for name in names} for site in SITES}
    shared = [name for name in names if statistic_kind(name).of in ("input", "input_pair")]
    made["block.k"] |= {name: made["block.q"][name] for name in shared}
    return made


def see(statistics: dict[str, dict[str, Statistic]], batches: range) -> None:
    """Update with some of the batches; the expert is reached by the first one alone, ``idle`` by none."""
    for number in batches:
        generator = torch.Generator().manual_seed(number)
        x = torch.randn(EXAMPLES, 9, IN, generator=generator)
        g = torch.randn(EXAMPLES, 9, OUT, generator=generator)
        for site in SITES[: 3 if number == 0 else 2]:
            for name, statistic in statistics[site].items():
                of = statistic_kind(name).of
                if site == "block.k" and of in ("input", "input_pair"):
                    continue  # updated by q
                statistic.update(g if of == "output" else x, x * 2 if of == "input_pair" else g)


def found(statistics: dict[str, dict[str, Statistic]]) -> dict[str, tuple[int, torch.Tensor]]:
    return {f"{site} {name}": (one.tokens, one.value) for site, own in statistics.items() for name, one in own.items()}


def add_up(rank: int, place: Path) -> None:
    """On every rank: its share of the batches, added up; ranks hold the sites in different order."""
    count = distributed.get_world_size()
    mine = empty()
    see(mine, range(rank, BATCHES, count))
    all_reduce(dict(sorted(mine.items(), reverse=rank == 1)))
    torch.save(found(mine), place / f"rank-{rank}")

    few = distributed.new_group([0, 1])
    if rank < 2:
        pair = empty(("gram",))
        see(pair, range(rank, 2, 2))
        all_reduce(pair, few)
        torch.save(found(pair), place / f"pair-{rank}")


def disagree(rank: int, place: Path) -> None:
    """On every rank: what it says when the last rank holds something else."""
    last = rank == distributed.get_world_size() - 1
    fewer = empty(("gram",) if last else ("gram", "energy", "magnitude"))
    wider = empty(("gram",), IN + 1 if last else IN)
    for number, statistics in enumerate((fewer, wider)):
        with pytest.raises(ParedError) as error:
            all_reduce(statistics)
        (place / f"error-{number}-{rank}").write_text(str(error.value))
    all_reduce(empty(("gram",)))  # the group still works


@pytest.fixture(scope="module", params=[2, 3])
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, tuple]]:
    place = tmp_path_factory.mktemp("ranks")
    run_ranks(request.param, add_up, place)
    pairs = [torch.load(place / f"pair-{rank}") for rank in range(2)]
    expected = empty(("gram",))
    see(expected, range(2))
    for pair in pairs:
        for key, (tokens, value) in found(expected).items():
            assert pair[key][0] == tokens, "a smaller group adds up its own ranks"
            torch.testing.assert_close(pair[key][1], value, rtol=1e-12, atol=0)
    return [torch.load(place / f"rank-{rank}") for rank in range(request.param)]


def test_ranks_hold_what_one_process_would(ranks: list[dict[str, tuple[int, torch.Tensor]]]) -> None:
    """To 1e-12 of the norm, where every group of examples is whole; the batches are the same."""
    one = empty()
    see(one, range(BATCHES))
    for key, (tokens, value) in found(one).items():
        found_tokens, found_value = ranks[0][key]
        assert found_tokens == tokens
        if not key.endswith("fisher:2"):
            assert float((found_value - value).norm()) <= 1e-12 * float(value.norm()), key
    assert ranks[0]["block.idle gram"][0] == 0
    assert ranks[0]["block.expert gram"][0] == EXAMPLES * 9


def test_a_group_of_examples_that_a_rank_leaves_open_is_one_of_its_own(
    ranks: list[dict[str, tuple[int, torch.Tensor]]],
) -> None:
    """As where the accumulators of the ranks are merged one after the other in one process."""
    total = empty(("fisher:2",))
    for rank in range(len(ranks)):
        own = empty(("fisher:2",))
        see(own, range(rank, BATCHES, len(ranks)))
        for site in SITES:
            total[site]["fisher:2"].merge(own[site]["fisher:2"])
    for site in SITES:
        value = total[site]["fisher:2"].value
        assert float((ranks[0][f"{site} fisher:2"][1] - value).norm()) <= 1e-12 * float(value.norm())


def test_all_ranks_hold_the_same_bits(ranks: list[dict[str, tuple[int, torch.Tensor]]]) -> None:
    for other in ranks[1:]:
        for key, (tokens, value) in ranks[0].items():
            assert other[key][0] == tokens
            assert torch.equal(other[key][1], value)


def test_ranks_that_hold_different_statistics_are_told_and_none_waits(tmp_path: Path) -> None:
    run_ranks(3, disagree, tmp_path)
    for rank in range(3):
        told = [(tmp_path / f"error-{number}-{rank}").read_text() for number in (0, 1)]
        assert "block.expert: energy is Energy of 70 features (input) on rank 0 and nothing on rank 2" in told[0]
        assert "Gram of 70 features (input) on rank 0 and Gram of 71 features (input) on rank 2" in told[1]
        assert all("start every rank with the same model and recipe" in one for one in told)


def test_without_processes_nothing_is_added() -> None:
    one, other = empty(), empty()
    see(one, range(2))
    see(other, range(2))
    all_reduce(one)
    for key, (tokens, value) in found(other).items():
        assert found(one)[key][0] == tokens
        assert torch.equal(found(one)[key][1], value), key
