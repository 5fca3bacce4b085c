"""The evolutionary loop on a fitness whose optimum is known: found, the same for a seed, and within its budget."""

import math
import random
from collections.abc import Callable
from itertools import pairwise

import pytest

from pared.allocation.dsa import EVERYTHING, Program, parse
from pared.errors import ParedError
from pared.schema.search import SearchConfig
from pared.search import evolution
from pared.search.evolution import Candidate, Measured, Result, best_so_far, evolve, population

OPTIMUM = parse("W:(ABSLOG,POW)-(VAR)-(ATAN,EXP)-(9)-(KEEP)")


class Inline:
    """Measures at once, keeps what it measured, and hands it out in any order."""

    def __init__(self, fitness: Callable[[Candidate], Measured], shuffle: int | None = None) -> None:
        self.fitness, self.ready, self.asked = fitness, list[tuple[int, Measured]](), list[Candidate]()
        self.random = None if shuffle is None else random.Random(shuffle)
        self.most = 0

    def submit(self, candidate: Candidate) -> None:
        self.asked.append(candidate)
        self.ready.append((candidate.number, self.fitness(candidate)))
        self.most = max(self.most, len(self.ready))

    def next(self) -> tuple[int, Measured]:
        return self.ready.pop(self.random.randrange(len(self.ready)) if self.random else 0)


class Book:
    """Remembers in a list."""

    def __init__(self, known: list[Measured] | None = None) -> None:
        self.known, self.lines = known or [], list[tuple[Candidate, Measured]]()

    def recall(self, candidate: Candidate) -> Measured | None:
        return self.known[candidate.number] if candidate.number < len(self.known) else None

    def remember(self, candidate: Candidate, measured: Measured) -> None:
        assert candidate.number == len(self.lines)
        self.lines.append((candidate, measured))


def distance(program: Program) -> float:
    """In how many places a program differs from the optimum."""
    pre, post = (tuple((*own, "", "")[:2]) for own in (program.pre, program.post))
    places = zip((*pre, *post), (*OPTIMUM.pre, *OPTIMUM.post), strict=True)
    return float(
        sum(a != b for a, b in places)
        + (program.reduce != OPTIMUM.reduce)
        + (program.spread != OPTIMUM.spread)
        + (program.sign != OPTIMUM.sign)
    )


def everything(program: Program) -> tuple[int, ...]:
    """Accept every program; each is an allocation of its own."""
    return tuple(str(program).encode())


def plain(candidate: Candidate) -> Measured:
    return Measured((distance(candidate.program),))


def search(config: SearchConfig, shuffle: int | None = None, allocate=everything, fitness=plain, known=None):
    pool, book = Inline(fitness, shuffle), Book(known)
    return evolve(config, allocate, pool, book), pool, book


@pytest.mark.parametrize("seeds", [6, pytest.param(40, marks=pytest.mark.slow)])
def test_the_optimum_is_found_in_more_than_95_percent_of_the_seeds(seeds: int) -> None:
    """Of 3.7 million programs, among the first 370."""
    found = [
        min(result.fitness for result in search(SearchConfig(iterations=350, seed=seed))[0]) == 0
        for seed in range(seeds)
    ]
    assert sum(found) > 0.95 * len(found)


def test_evolution_is_better_than_random_programs_at_the_same_budget() -> None:
    for seed in range(5):
        evolved, _, _ = search(SearchConfig(iterations=300, seed=seed))
        at_random, _, _ = search(SearchConfig(iterations=300, seed=seed, strategy="random"))
        assert best_so_far(evolved)[-1] < best_so_far(at_random)[-1]


def test_the_same_seed_is_the_same_search_and_another_is_another() -> None:
    first, second, other = (search(SearchConfig(iterations=50, seed=seed))[2].lines for seed in (3, 3, 4))
    assert first == second
    assert first != other


@pytest.mark.parametrize("workers", [2, 5])
def test_the_order_in_which_workers_finish_changes_nothing(workers: int) -> None:
    config = SearchConfig(iterations=80, seed=1, workers=workers)
    lines = [search(config, shuffle)[2].lines for shuffle in (None, 1, 2)]
    assert lines[0] == lines[1] == lines[2]
    assert search(config, 3)[1].most == workers


def test_what_is_remembered_is_not_measured_again_and_changes_nothing() -> None:
    config = SearchConfig(iterations=60, seed=2, workers=3)
    whole, _, book = search(config, 1)
    known = [measured for _, measured in book.lines[:37]]
    resumed, pool, _ = search(config, 2, known=known)
    assert resumed == whole
    assert [candidate.number for candidate in sorted(pool.asked, key=lambda one: one.number)] == list(range(37, 80))


def test_a_rejected_program_is_never_measured_and_none_twice() -> None:
    def picky(program: Program) -> tuple[int, ...] | None:
        return None if program.sign == "prune" else (program.spread, len(program.pre), hash(program.reduce) % 97)

    results, pool, _ = search(SearchConfig(iterations=40, seed=0), allocate=picky)
    assert all(candidate.program.sign == "keep" for candidate in pool.asked)
    assert len({candidate.allocation for candidate in pool.asked}) == len(pool.asked) == len(results)


def test_no_more_than_the_budget_is_measured_and_the_best_never_becomes_worse() -> None:
    for config in (
        SearchConfig(iterations=30, seed=5),
        SearchConfig(iterations=0, population=4),
        SearchConfig(iterations=1, workers=9),
    ):
        results, pool, _ = search(config)
        assert len(pool.asked) == len(results) == config.population + config.iterations
        best = best_so_far(results)
        assert all(later <= earlier for earlier, later in pairwise(best))


def test_the_population_is_constant_and_holds_the_best() -> None:
    results, _, _ = search(SearchConfig(iterations=100, seed=6))
    alive: list[Result] = []
    for count, result in enumerate(results, 1):  # as the paper has it: insert, drop the worst
        alive = sorted([*alive, result], key=lambda one: one.rank)[:20]
        assert population(results[:count], 20) == alive
        assert len(alive) == min(count, 20)


def test_a_small_space_ends_the_search_early_and_an_empty_one_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evolution, "DRAWS", 200)
    results, _, _ = search(SearchConfig(iterations=50), allocate=lambda program: (program.spread,))
    assert len(results) == len(EVERYTHING.spreads)
    with pytest.raises(ParedError, match="none of 200 random programs"):
        search(SearchConfig(), allocate=lambda _: None)


def test_who_is_worse_than_half_of_the_population_is_stopped_and_has_no_children() -> None:
    def stepwise(candidate: Candidate) -> Measured:
        values = [distance(candidate.program) + 0.5]
        for limit in candidate.limits:
            if values[-1] > limit:
                break
            values.append(distance(candidate.program))
        return Measured(tuple(values))

    results, _, _ = search(SearchConfig(iterations=200, seed=1, halving=True), fitness=stepwise)
    assert all(result.complete for result in results[:20]), "the first population is measured as a whole"
    stopped = [result for result in results if not result.complete]
    assert stopped
    for result in stopped:
        assert result.fitness == math.inf
        alive = population(results[: result.candidate.number], 20)
        assert result not in alive
        assert sum(one.measured.values[0] < result.measured.values[0] for one in alive) >= 10
    assert best_so_far(results)[-1] <= 1


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"iterations": -1}, "iterations of a search: expected 0 or more, got -1"),
        ({"population": 1}, "population of a search: expected 2 or more, got 1"),
        ({"top": 1}, "top of a search: expected 2 or more"),
        ({"workers": 0}, "workers of a search: expected 1 or more"),
        ({"windows": 0}, "windows of a search: expected 1 or more, got 0"),
        ({"sample_ratio": 0.0}, r"expected a fraction in \(0, 1\], got 0.0"),
        ({"strategy": "grid"}, "expected evolution or random, got 'grid'"),
    ],
)
def test_rules_that_make_no_search_are_refused(fields, told: str) -> None:
    with pytest.raises(ParedError, match=told):
        SearchConfig(**fields)
