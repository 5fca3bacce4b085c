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
from typing import Protocol

from pared.allocation.dsa import EVERYTHING, Program, Space, crossover, mutate, random_program
from pared.errors import ParedError
from pared.schema.search import SearchConfig

CHILDREN = 50  # drawn from parents for one candidate before random programs are drawn
DRAWS = 2000  # for one candidate before the search is over

Allocation = tuple[int, ...]  # what becomes of every site, in whole numbers: zeros, or ranks
Allocate = Callable[[Program], Allocation | None]  # None is a rejected program


@dataclass(frozen=True)
class Candidate:
    """A program to be measured.

    Attributes:
        number: from 0.
        program: a valid one, whose allocation no candidate before it has.
        allocation: what it makes of the model.
        limits: the value up to which it continues after each step but the last.
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
    config: SearchConfig,
    allocate: Allocate,
    pool: Pool,
    memory: Memory,
    space: Space = EVERYTHING,
    advance: Callable[[bool], None] = lambda _: None,
) -> list[Result]:
    """Search, and return all results in the order of their numbers.

    Fewer than ``config.total`` come back only where ``DRAWS`` programs in a row are rejected or repeat an allocation.

    Args:
        config: how.
        allocate: what a program makes of the model, None if it is rejected; quick, and without any chance in it.
        pool: measures; is given at most ``config.workers`` candidates at a time.
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
    number, total = 0, config.total
    while len(results) < total:
        while number < total and number - len(results) < config.workers:
            known = results[: max(0, number - config.workers + 1)]
            candidate = propose(config, number, known, seen, allocate, space)
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
        results.append(Result(candidate, measured, config.rungs))
        advance(candidate.number in recalled)
    if not results:
        raise ParedError(f"none of {DRAWS} random programs gives the blocks different shares; nothing to search for")
    return results


def propose(
    config: SearchConfig, number: int, known: Sequence[Result], seen: set[Allocation], allocate: Allocate, space: Space
) -> Candidate | None:
    """Draw a candidate that is valid and new; None if none is found.

    Args:
        config: how.
        number: of the candidate.
        known: the results it may know.
        seen: allocations of the candidates before it.
        allocate: as in :func:`evolve`.
        space: what programs are drawn from.
    """
    generator = Random(f"{config.seed}:{number}")
    people = population(known, config.population)
    evolving = config.strategy == "evolution" and number >= config.population and len(people) > 1
    for draw in range(1, DRAWS + 1):
        program = (
            _child(people, config, generator, space)
            if evolving and draw <= CHILDREN
            else random_program(generator, space)
        )
        allocation = allocate(program)
        if allocation is not None and allocation not in seen:
            return Candidate(number, program, allocation, _limits(config, number, people), draw)
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


def _child(people: list[Result], config: SearchConfig, generator: Random, space: Space) -> Program:
    """Draw two parents among the best of a sample, cross them over and change one place."""
    sample = generator.sample(people, max(2, round(config.sample_ratio * len(people))))
    best = sorted(sample, key=lambda result: result.rank)[: config.top]
    a, b = generator.sample(best, 2)
    return mutate(crossover(a.candidate.program, b.candidate.program, generator), generator, space)


def _limits(config: SearchConfig, number: int, people: list[Result]) -> tuple[float, ...]:
    """Return what the better half of the population had after each step; none for the first population."""
    if number < config.population or not people:
        return (math.inf,) * (config.rungs - 1)
    return tuple(median(one.measured.values[step] for one in people) for step in range(config.rungs - 1))
