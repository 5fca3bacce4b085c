"""What one pass over the blocks has finished, for the loop that resumes after it and for what visits blocks.

What visits find lies in tables: dictionaries of JSON by name, which only grow. A line of the journal tells what came
to them since the line before.
"""

from collections.abc import Callable, Mapping, Set
from pathlib import Path
from typing import Any, Protocol

from pared.engine.state.run_state import CompressionRun
from pared.structure.store import BlockStore, block_file

Tables = dict[str, dict[str, Any]]


class Record(Protocol):
    """What a loop asks and records about the blocks of its pass."""

    def holds(self, index: int) -> bool:
        """Whether a block was finished by an earlier process."""

    def found(self) -> Tables:
        """Return what visits of earlier processes found of the blocks that they finished."""

    def files(self) -> dict[str, Path]:
        """Return the files of the blocks that earlier processes finished, by name."""

    def restore(self, index: int) -> None:
        """Put what became of a finished block in its place, if it was changed."""

    def finish(self, index: int) -> None:
        """Have it on the disk that a block is finished, once it is committed."""


class NoRecord:
    """The record of a pass that begins at its first block in every process. Satisfies :class:`Record`."""

    def holds(self, index: int) -> bool:  # noqa: ARG002 - of any block
        """No: nothing was recorded."""
        return False

    def found(self) -> Tables:
        """Nothing."""
        return {}

    def files(self) -> dict[str, Path]:
        """None."""
        return {}

    def restore(self, index: int) -> None:
        """Do nothing: it never comes to that."""

    def finish(self, index: int) -> None:
        """Do nothing."""


class Held:
    """Which blocks of a pass an earlier process has finished.

    Args:
        store: hands out the blocks.
        held: indices of those that are finished.
    """

    def __init__(self, store: BlockStore, held: Set[int]) -> None:
        self._store, self._held = store, held

    @property
    def blocks(self) -> range:
        """The indices of all blocks."""
        return range(len(self._store))

    @property
    def complete(self) -> bool:
        """Whether an earlier process has finished the whole pass."""
        return len(self._held) == len(self._store)

    def holds(self, index: int) -> bool:
        """Whether a block was finished by an earlier process."""
        return index in self._held


class PassRecord(Held):
    """The record of one pass. Satisfies :class:`Record`.

    Blocks that are changed together count as finished when all of them are.

    Args:
        run: that the pass belongs to.
        store: that changed blocks are committed to.
        number: of the pass.
        tables: gives what visits have found so far.
        written: gives the files that visits have written since it was last asked.
        changes: whether the pass changes blocks.
        group: how many neighbouring blocks are finished together.
        replaces: whether the files that blocks were committed to before are no longer needed.
    """

    def __init__(
        self,
        run: CompressionRun,
        store: BlockStore,
        number: int,
        tables: Callable[[], Mapping[str, Mapping[str, Any]]],
        *,
        written: Callable[[], list[Path]] = list,
        changes: bool = False,
        group: int = 1,
        replaces: bool = False,
    ) -> None:
        self._run, self._number, self.name = run, number, f"pass-{number}"
        self._tables, self._written = tables, written
        self._changes, self._replaces = changes, replaces
        self._before = list(store.files)
        there, count = run.finished(self.name), len(store)
        held = {
            index
            for index in range(count)
            if there.issuperset(range(index - index % group, min(index - index % group + group, count)))
        }
        super().__init__(store, held)
        self._told = self.found()

    def found(self) -> Tables:
        """Return what visits of earlier processes found of the blocks that they finished."""
        found: Tables = {}
        for index in sorted(self._held):
            for name, table in self._run.fields(self.name, index).items():
                found.setdefault(name, {}).update(table)
        return found

    def files(self) -> dict[str, Path]:
        """Return the files of the blocks that earlier processes finished, by name.

        Raises:
            ParedError: one is missing or damaged.
        """
        return {file.name: file for index in sorted(self._held) for file in self._run.files(self.name, index)}

    def restore(self, index: int) -> None:
        """Put what became of a finished block in its place, if it was changed.

        Where a later pass has replaced it that is what the later one made: blocks behind it may share its basis.
        """
        if self._changes and (file := self._run.newest(block_file(self._number, index))) is not None:
            self._store.adopt(index, file)

    def finish(self, index: int) -> None:
        """Have it on the disk that a block is finished, once it is committed.

        Raises:
            ParedError: the disk is full.
        """
        if index in self._held:
            return
        tables = self._tables()
        new = {
            name: {key: value for key, value in table.items() if key not in self._told.get(name, {})}
            for name, table in tables.items()
        }
        files, now, before = self._written(), self._store.files[index], self._before[index]
        if self._changes and now is not None:
            files.append(now)
        drops = [before] if self._replaces and before is not None else []
        self._run.record(self.name, index, {name: table for name, table in new.items() if table}, files, drops)
        for name, table in new.items():
            self._told.setdefault(name, {}).update(table)
