"""The evolutionary search for a program, apart from what a program is worth and from where that is measured.

L. Li et al., "Discovering Sparsity Allocation for Layer-wise Pruning of Large Language Models", NeurIPS 2024: a
population of 20, 1,000 iterations, parents among the 5 best of 90% of the population, one slot crossed over, one
operator mutated. Candidate n is drawn by a generator of its own, seeded with ``(seed, n)``, from the results of the
candidates up to ``n - workers`` alone, so that the order in which several workers finish changes nothing.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from statistics import median
from typing import Literal, Protocol, get_args

from pared.allocation.dsa import EVERYTHING, Program, Space, crossover, mutate, random_program
from pared.errors import ParedError

CHILDREN = 50  # drawn from parents for one candidate before random programs are drawn
DRAWS = 2000  # for one candidate before the search is over

Strategy = Literal["evolution", "random"]
Allocation = tuple[int, ...]  # what becomes of every site, in whole numbers: zeros, or ranks
Allocate = Callable[[Program], Allocation | None]  # None is a rejected program


@dataclass(frozen=True)
class Rules:
    """How a search goes.

    Attributes:
        iterations: candidates after the first population.
        population: programs that may become parents.
        sample_ratio: part of the population that parents are looked for in.
        top: the best of that part, among which two parents are drawn.
        seed: of all randomness.
        strategy: ``evolution``, or ``random`` programs all along, to compare with.
        workers: candidates measured at a time; the last ``workers - 1`` before a candidate are unknown to it.
        rungs: in how many steps a candidate is measured; it may be stopped after any but the last.
    """

    iterations: int = 1000
    population: int = 20
    sample_ratio: float = 0.9
    top: int = 5
    seed: int = 0
    strategy: Strategy = "evolution"
    workers: int = 1
    rungs: int = 1

    def __post_init__(self) -> None:
        for name, least in (("iterations", 0), ("population", 2), ("top", 2), ("workers", 1), ("rungs", 1)):
            if getattr(self, name) < least:
                raise ParedError(f"{name} of a search: expected {least} or more, found {getattr(self, name)}")
        if not 0 < self.sample_ratio <= 1:
            raise ParedError(f"sample ratio of a search: expected a fraction in (0, 1], found {self.sample_ratio}")
        if self.strategy not in get_args(Strategy):
            raise ParedError(f"strategy of a search: expected evolution or random, found {self.strategy!r}")

    @property
    def total(self) -> int:
        """Candidates in all."""
        return self.population + self.iterations


@dataclass(frozen=True)
class Candidate:
    """A program to be measured.

    Attributes:
        number: from 0.
        program: a valid one, whose allocation no candidate before it has.
        allocation: what it makes of the model.
        limits: the value up to which it goes on after each step but the last.
        draws: programs that were drawn for it, this one included.
    """

    number: int
    program: Program
    allocation: Allocation
    limits: tuple[float, ...] = ()
    draws: int = 1


@dataclass(frozen=True)
class Measured:
    """What was found of a candidate.

    Attributes:
        values: perplexity after each step that was taken, infinite where it is not a number.
        why: what went wrong, empty if nothing.
    """

    values: tuple[float, ...]
    why: str = ""


@dataclass(frozen=True)
class Result:
    """A candidate and what was found of it.

    Attributes:
        candidate: what was measured.
        measured: what was found.
        rungs: steps of a complete measurement.
    """

    candidate: Candidate
    measured: Measured
    rungs: int

    @property
    def complete(self) -> bool:
        """Whether the last step was taken."""
        return len(self.measured.values) == self.rungs

    @property
    def fitness(self) -> float:
        """The value of the last step, the less the better; infinite if it was not taken."""
        return self.measured.values[-1] if self.complete else math.inf

    @property
    def rank(self) -> tuple[bool, float, int]:
        """What results are ordered by: complete ones first, the least fitness, the first of equals."""
        return not self.complete, self.fitness, self.candidate.number


class Pool(Protocol):
    """Measures candidates, in any order."""

    def submit(self, candidate: Candidate) -> None:
        """Begin with a candidate."""

    def next(self) -> tuple[int, Measured]:
        """Wait for any candidate that was begun; return its number and what was found."""


class Memory(Protocol):
    """Remembers results in the order of their numbers."""

    def recall(self, candidate: Candidate) -> Measured | None:
        """Return what was found of a candidate before, None if nothing was."""

    def remember(self, candidate: Candidate, measured: Measured) -> None:
        """Keep what was found."""


def evolve(
    rules: Rules,
    allocate: Allocate,
    pool: Pool,
    memory: Memory,
    space: Space = EVERYTHING,
    advance: Callable[[bool], None] = lambda _: None,
) -> list[Result]:
    """Search, and return all results in the order of their numbers.

    Fewer than ``rules.total`` come back only where ``DRAWS`` programs in a row are rejected or repeat an allocation.

    Args:
        rules: how.
        allocate: what a program makes of the model, None if it is rejected; quick, and without any chance in it.
        pool: measures; is given at most ``rules.workers`` candidates at a time.
        memory: is told every result, in order; what it knows is not measured again.
        space: what programs are drawn from.
        advance: called after every result; is told whether memory knew it.

    Raises:
        ParedError: no valid program is found at all, or memory holds another search.
    """
    results: list[Result] = []
    flying: dict[int, Candidate] = {}
    landed: dict[int, Measured] = {}
    recalled: set[int] = set()
    seen: set[Allocation] = set()
    number, total = 0, rules.total
    while len(results) < total:
        while number < total and number - len(results) < rules.workers:
            known = results[: max(0, number - rules.workers + 1)]
            candidate = propose(rules, number, known, seen, allocate, space)
            if candidate is None:
                total = number
                break
            seen.add(candidate.allocation)
            flying[number] = candidate
            found = memory.recall(candidate)
            if found is None:
                pool.submit(candidate)
            else:
                landed[number] = found
                recalled.add(number)
            number += 1
        if len(results) == total:
            break
        if len(results) not in landed:
            finished, measured = pool.next()
            landed[finished] = measured
            continue
        candidate, measured = flying.pop(len(results)), landed.pop(len(results))
        memory.remember(candidate, measured)
        results.append(Result(candidate, measured, rules.rungs))
        advance(candidate.number in recalled)
    if not results:
        raise ParedError(f"none of {DRAWS} random programs gives the blocks different shares; nothing to search for")
    return results


def propose(
    rules: Rules, number: int, known: Sequence[Result], seen: set[Allocation], allocate: Allocate, space: Space
) -> Candidate | None:
    """Draw a candidate that is valid and new; None if none is found.

    Args:
        rules: how.
        number: of the candidate.
        known: the results it may know.
        seen: allocations of the candidates before it.
        allocate: as in :func:`evolve`.
        space: what programs are drawn from.
    """
    generator = Random(f"{rules.seed}:{number}")
    people = population(known, rules.population)
    evolving = rules.strategy == "evolution" and number >= rules.population and len(people) > 1
    for draw in range(1, DRAWS + 1):
        program = (
            _child(people, rules, generator, space)
            if evolving and draw <= CHILDREN
            else random_program(generator, space)
        )
        allocation = allocate(program)
        if allocation is not None and allocation not in seen:
            return Candidate(number, program, allocation, _limits(rules, number, people), draw)
    return None


def population(results: Sequence[Result], size: int) -> list[Result]:
    """Return who is alive: results are inserted and the worst dropped, which leaves the best of all complete ones."""
    return sorted((result for result in results if result.complete), key=lambda result: result.rank)[:size]


def best_so_far(results: Sequence[Result]) -> list[float]:
    """Return the least fitness up to each result."""
    best, found = math.inf, []
    for result in results:
        best = min(best, result.fitness)
        found.append(best)
    return found


def _child(people: list[Result], rules: Rules, generator: Random, space: Space) -> Program:
    """Draw two parents among the best of a sample, cross them over and change one place."""
    sample = generator.sample(people, max(2, round(rules.sample_ratio * len(people))))
    best = sorted(sample, key=lambda result: result.rank)[: rules.top]
    a, b = generator.sample(best, 2)
    return mutate(crossover(a.candidate.program, b.candidate.program, generator), generator, space)


def _limits(rules: Rules, number: int, people: list[Result]) -> tuple[float, ...]:
    """Return what the better half of the population had after each step; none for the first population."""
    if number < rules.population or not people:
        return (math.inf,) * (rules.rungs - 1)
    return tuple(median(one.measured.values[step] for one in people) for step in range(rules.rungs - 1))
