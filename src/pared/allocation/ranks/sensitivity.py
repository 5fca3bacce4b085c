"""ASVD's truncation rank search: every weight alone, at every candidate size, by the perplexity it leaves.

Z. Yuan et al., 2023, arXiv 2312.05821, section 3.4.
"""

import hashlib
import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pared.allocation.rank_budget import split_fixed
from pared.allocation.units import Budget, Evidence, Unit
from pared.errors import ParedError
from pared.io.files import cache_folder
from pared.io.journal import Journal, opened
from pared.io.lock import opened_alone
from pared.schema.plan import Decision, Dense

log = logging.getLogger(__name__)

HEADER, FORMAT = "pared_sensitivity", 1
CANDIDATES = (0.4, 0.5, 0.6, 0.7, 0.8, 0.9)  # fractions of a weight's parameters


class Trial(NamedTuple):
    """One weight at one rank, everything else dense, and the perplexity that leaves."""

    perplexity: float
    unit: str
    rank: int


def sensitivity(units: Sequence[Unit], budget: Budget, evidence: Evidence, _: object = None) -> dict[str, Decision]:
    """Measure every weight at every candidate size, and take the least harmful trials until the budget is met.

    The trials are sorted by perplexity; those after a cut are applied, a weight taking the smallest rank among its own,
    and staying dense if it has none. The cut is the latest that meets the budget. (The released code applies the last
    cut it looked at, which may miss the budget, and takes sensitivity to be monotone: where it is not, a weight may
    take a small rank whose larger ones were not selected, here as there, because the perplexity says so.)

    It costs ``weights · candidates`` evaluations; what was measured is kept on disk and never measured twice.

    Args:
        units: what can be decided.
        budget: the fraction to keep, and what a rank costs.
        evidence: a trial, and the key that its results are kept under.

    Raises:
        ParedError: there is no trial, or the smallest candidates do not meet the budget.
    """
    if evidence.trial is None:
        raise ParedError("allocation sensitivity measures perplexities; this model has none")
    open_units, fixed, left = split_fixed(units, budget)
    trials: list[Trial] = []
    with SensitivityCache(evidence.key) as cache:
        for number, unit in enumerate(open_units, 1):
            for rank in sorted({budget.rank(unit, ratio) for ratio in CANDIDATES} - {0}):
                found = cache.get(unit.name, rank)
                if found is None:
                    found = evidence.trial({unit.name: budget.low_rank(rank)})
                    cache.put(unit.name, rank, found)
                trials.append(Trial(math.inf if math.isnan(found) else found, unit.name, rank))
            log.info("allocation sensitivity: %d of %d weights measured", number, len(open_units))
    decided = {**fixed, **cut(open_units, trials, left, budget)}
    return {unit.name: decided[unit.name] for unit in units}


def cut(units: Sequence[Unit], trials: Sequence[Trial], parameters: int, budget: Budget) -> dict[str, Decision]:
    """Apply the fewest of the least harmful trials that meet a number of parameters.

    Args:
        units: what can be decided.
        trials: of them, in any order; equal perplexities are ordered by name and rank.
        parameters: that may be stored in all.
        budget: what a rank costs.

    Raises:
        ParedError: all trials together do not meet it; says the least ``keep`` that they reach.
    """
    order = sorted(trials, key=lambda trial: (-trial.perplexity, trial.unit, trial.rank))
    by_name = {unit.name: unit for unit in units}

    def applied(start: int) -> dict[str, int]:
        ranks: dict[str, int] = {}
        for trial in order[start:]:
            ranks[trial.unit] = min(trial.rank, ranks.get(trial.unit, trial.rank))
        return ranks

    def cost(ranks: dict[str, int]) -> int:
        return sum(
            budget.cost(unit, ranks[name]) if name in ranks else unit.parameters for name, unit in by_name.items()
        )

    if cost(applied(0)) > parameters:
        total = sum(unit.parameters for unit in units)
        least = math.ceil(cost(applied(0)) / max(total, 1) * 1e4) / 1e4
        raise ParedError(
            f"allocation sensitivity: candidates of {CANDIDATES[0]:g} to {CANDIDATES[-1]:g} of a weight reach keep "
            f"{least:g}, got {parameters / max(total, 1):.4g}; keep more, or take another allocation"
        )
    low, high = 0, len(order)  # applying from `low` on meets the budget; fewer trials store more
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if cost(applied(middle)) <= parameters else (low, middle)
    if cost({}) <= parameters:
        low = len(order)
    ranks = applied(low)
    dense = Dense(reason="more harmful to compress than others")
    return {name: budget.low_rank(ranks[name]) if name in ranks else dense for name in by_name}


class SensitivityCache:
    """Perplexities of trials, in a journal of its own key; without a key they are kept in memory only.

    A context manager. Where the journal cannot be used, as another process measures the same trials or the file is
    damaged, that is reported, and these trials are not kept.

    Args:
        key: of everything a perplexity depends on but the weight and its rank.
        folder: where the journals are; the user's cache folder if none.
    """

    def __init__(self, key: str | None, folder: Path | None = None) -> None:
        self._known: dict[tuple[str, int], float] = {}
        self._journal: Journal | None = None
        if key is None:
            return
        file = (folder or cache_folder() / "sensitivity") / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.jsonl"
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            _with_header(file)
            self._journal = Journal(file, {HEADER: FORMAT}, what="trials", of="allocation sensitivity")
            for line in self._journal.entries:
                self._known[str(line["unit"]), int(line["rank"])] = float(line["perplexity"])
        except (ParedError, OSError, KeyError, TypeError, ValueError) as error:
            log.warning("%s; the trials of this run are not kept", error)
            self.close()

    def __enter__(self) -> "SensitivityCache":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def get(self, unit: str, rank: int) -> float | None:
        """Return what was measured, None if it was not."""
        return self._known.get((unit, rank))

    def put(self, unit: str, rank: int, perplexity: float) -> None:
        """Keep a measurement, at once.

        Raises:
            ParedError: it cannot be written.
        """
        self._known[unit, rank] = perplexity
        if self._journal is not None:
            self._journal.append({"unit": unit, "rank": rank, "perplexity": perplexity})

    def close(self) -> None:
        """Let others have the journal."""
        if self._journal is not None:
            self._journal.close()
        self._journal = None


def _with_header(file: Path) -> None:
    """Make a journal of a file of before trials were one: its lines stand alone, and damaged ones are left out."""
    if not file.exists():
        return
    with opened_alone(file, "trials", f"trials {file}: another process measures them") as held:
        held.seek(0)
        content = held.read()
        if content.startswith(b'{"unit"'):
            Journal.write(file, {HEADER: FORMAT}, _standing_alone(file, content))


def _standing_alone(file: Path, content: bytes) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for number, line in enumerate(content.splitlines(), 1):
        one = opened(line)
        if one is None or not one[1]:
            log.warning("%s line %d is not a measurement; ignored", file, number)
        else:
            found.append(one[0])
    return found
