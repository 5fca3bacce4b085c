"""Rates and the time left count the work that is done now, and not what was done before a crash."""

import io

import pytest
from rich.console import Console

from pared.cli import console
from pared.progress import Pace
from pared.schema.search import SearchConfig
from pared.search.evolution import evolve


class Clock:
    seconds = 100.0

    def __call__(self) -> float:
        return self.seconds


def test_steps_done_before_a_crash_are_no_part_of_the_rate() -> None:
    clock = Clock()
    pace = Pace(1000, clock)
    for _ in range(900):
        clock.seconds += 0.01  # read from a journal
        pace.step(recalled=True)
    assert (pace.done, pace.rate, pace.left) == (900, None, None)
    for _ in range(10):
        clock.seconds += 2
        pace.step()
    assert pace.rate == pytest.approx(0.5)
    assert pace.left == pytest.approx(180)


def test_without_a_crash_all_steps_count() -> None:
    clock = Clock()
    pace = Pace(10, clock)
    for _ in range(4):
        clock.seconds += 3
        pace.step()
    assert pace.rate == pytest.approx(1 / 3)
    assert pace.left == pytest.approx(18)


@pytest.mark.parametrize("terminal", [False, True])
def test_a_resumed_stage_tells_the_rate_of_what_it_does(monkeypatch: pytest.MonkeyPatch, terminal: bool) -> None:
    clock, told = Clock(), io.StringIO()
    monkeypatch.setattr(console, "err", Console(file=told, force_terminal=terminal, width=200))
    monkeypatch.setattr(console.time, "perf_counter", clock)
    with console.ConsoleProgress().stage("search", 500, "candidate") as advance:
        for _ in range(480):
            advance(recalled=True)
        for _ in range(10):
            clock.seconds += 4
            advance("best 3.1")
    assert "490/500" in told.getvalue()
    assert "0.25" in told.getvalue()
    assert ("40 s left" if terminal else "44 s left") in told.getvalue()  # lines come now and then
    assert "best 3.1" in told.getvalue()


def test_names_of_data_sets_are_no_emoji(capsys: pytest.CaptureFixture[str]) -> None:
    """Regression: ``mine/own:train:text`` was printed with a locomotive in it."""
    console.err.print("error: mine/own:train:text", markup=False)
    assert "mine/own:train:text" in capsys.readouterr().err


def test_a_resumed_search_says_which_results_it_recalls() -> None:
    from unit.search.test_evolution import Book, Inline, everything, plain

    config, first, again = SearchConfig(iterations=9, population=3), list[bool](), list[bool]()
    found = evolve(config, everything, Inline(plain), Book(), advance=first.append)
    evolve(config, everything, Inline(plain), Book([one.measured for one in found[:5]]), advance=again.append)
    assert first == [False] * 12
    assert again == [True] * 5 + [False] * 7
