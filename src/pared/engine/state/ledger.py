"""What a solver has found and keeps in files: told to the record of its pass, and taken up from one."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from pared.engine.state.pass_record import Record, Tables
from pared.engine.state.solutions import DecompositionStore
from pared.processes import ALONE, Processes


@dataclass
class Findings:
    """What was found of units, sites or channel groups, in tables by their names, as JSON has them.

    A table of which only the names are read holds True.

    Attributes:
        units: the names of the members of everything that was decomposed without a plan.
        comparisons: of the members of a group together and apart, as fields of
            :class:`pared.engine.targets.grouping.Comparison`.
        damping: relative, of statistics that were rank-deficient.
        shrinkage: how far the statistics of a site were shrunk, by statistic.
        fallbacks: what stood in for statistics that say nothing.
        unreached: sites that no calibration token reached, or too few, and why they stay dense.
        missed: units of a plan that could not be taken, as a member was not reached.
        untargeted: sites of a dense path that are sent other tokens than in the dense model, and so have no targets.
        kept: the channels that stay of a group that was made narrower.
    """

    units: dict[str, list[str]] = field(default_factory=dict)
    comparisons: dict[str, dict[str, Any]] = field(default_factory=dict)
    damping: dict[str, float] = field(default_factory=dict)
    shrinkage: dict[str, dict[str, float]] = field(default_factory=dict)
    fallbacks: dict[str, str] = field(default_factory=dict)
    unreached: dict[str, str] = field(default_factory=dict)
    missed: dict[str, bool] = field(default_factory=dict)
    untargeted: dict[str, bool] = field(default_factory=dict)
    kept: dict[str, str] = field(default_factory=dict)

    def tables(self) -> Tables:
        """Return the tables by their names; they grow as what is found does."""
        return {one.name: getattr(self, one.name) for one in fields(self)}

    def add(self, tables: Mapping[str, Mapping[str, Any]]) -> None:
        """Add what another process, now or earlier, found."""
        for name, table in self.tables().items():
            table.update(tables.get(name, {}))

    def take_results(self, again: "Findings") -> None:
        """Take what was found of weights behind compressed blocks in place of what the dense model gave."""
        results = "damping", "shrinkage", "fallbacks", "kept"
        self.add({name: table for name, table in again.tables().items() if name in results})

    def sort(self, order: Mapping[str, int]) -> None:
        """Put every table in the order of these places; names without one come last."""
        for table in self.tables().values():
            rows = sorted(table.items(), key=lambda row: order.get(row[0], len(order)))
            table.clear()
            table.update(rows)


class Ledger:
    """The findings of one solver, and the files of what it keeps until a plan is known.

    Args:
        store: of the files.
        processes: that solve together; the first keeps what outlives them.
        prefix: of the names of its tables in a record that several solvers share.

    Attributes:
        found: so far.
        store: of the files; in memory of every unit what leaving out each direction, or channel, costs.
    """

    def __init__(self, store: DecompositionStore, processes: Processes = ALONE, prefix: str = "") -> None:
        self.found, self.store = Findings(), store
        self._processes, self._prefix = processes, prefix

    def tables(self) -> Tables:
        """Return what was found so far, and the names of the files."""
        files = {name: file.name for name, file in self.store.files.items()}
        return {
            f"{self._prefix}{name}": dict(table) for name, table in (self.found.tables() | {"files": files}).items()
        }

    def written(self) -> list[Path]:
        """Return the files that were written since this was last asked."""
        return [self.store.files[name] for name in self.store.new()]

    def take_up(self, record: Record) -> None:
        """Take what an earlier job found of the blocks that it finished.

        Raises:
            ParedError: a file of it is missing or damaged.
        """
        found, files = record.found(), record.files()
        own = {name.removeprefix(self._prefix): one for name, one in found.items() if name.startswith(self._prefix)}
        self.found.add(own)
        if self._processes.is_first:
            for name, file in own.get("files", {}).items():
                self.store.take_up(name, files[file])
        spectra, rounding = self._processes.agreed((self.store.spectra, self.store.rounding))
        for name, spectrum_R in spectra.items():
            self.store.note(name, spectrum_R, rounding.get(name))
