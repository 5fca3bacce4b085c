"""What a search has found so far, on disk: one JSON object a line, each on the disk before the next is begun.

The first line holds the settings, every other one is named by what it tells of (``candidate 17``, ``final 2``). Nothing
in it depends on the clock: the same settings write the same bytes. Seconds go to a second file beside it.
"""

import math
import time
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from pared.errors import ParedError
from pared.io.journal import Journal
from pared.names import anew
from pared.search.evolution import Candidate, Measured

FORMAT = 1
HEADER = "pared_search"
SECONDS = "seconds.jsonl"


class SearchJournal:
    """The journal of one search; a context manager, and no two are open on one file at a time.

    A last line that was torn by a crash is dropped. Satisfies :class:`pared.search.evolution.Memory`.

    Attributes:
        path: of the file.
        resumed: lines that were there already, without the first.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        """Open a journal, or begin one.

        Args:
            path: of the file; its folder exists.
            settings: everything a result depends on, as JSON has it.

        Raises:
            ParedError: it is the journal of other settings, no journal, damaged, not a regular file, or open elsewhere.
        """
        self.path = path
        busy = _busy(path)
        with ExitStack() as stack:
            self._journal = stack.enter_context(
                Journal(
                    path,
                    {HEADER: FORMAT, **settings},
                    of="a search",
                    busy=busy,
                    advice=f"resume it with the same settings, start over ({anew()}), or name another folder",
                )
            )
            self._journal.begin()
            for number, line in enumerate(self._journal.entries, 2):
                if not _is_whole(line):
                    raise ParedError(f"journal {path}, line {number}: not a line of a search; the file is damaged")
            beside = path.with_name(SECONDS)
            self._seconds = stack.enter_context(
                Journal(beside, {"name": None}, what="seconds", of="a search", busy=busy, headed=False)
            )
            self._stack = stack.pop_all()
        self._lines = {str(line["name"]): line for line in self._journal.entries}
        self.resumed = len(self._lines)
        self._begun = time.time()

    def __enter__(self) -> "SearchJournal":
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @staticmethod
    def remove(path: Path, beside: Iterable[Path]) -> None:
        """Remove a journal, its seconds and other files of the search.

        Raises:
            ParedError: another search is writing it.
        """
        Journal.remove(path, "journal", _busy(path), [path.with_name(SECONDS), *beside])

    def get(self, name: str, program: str) -> Measured | None:
        """Return what a line tells, None if there is none of that name.

        Raises:
            ParedError: it tells of another program.
        """
        line = self._lines.get(name)
        if line is None:
            return None
        if line["program"] != program:
            raise ParedError(
                f"journal {self.path}: {name} is {line['program']}, and this search would measure {program}; it was "
                "made by another model, text or version; name another folder"
            )
        values = tuple(math.inf if value is None else float(value) for value in line["values"])
        return Measured(values, str(line.get("why", "")))

    def put(self, name: str, program: str, measured: Measured, **more: Any) -> None:
        """Write a line, unless it is there."""
        if name in self._lines:
            return
        values = [value if math.isfinite(value) else None for value in measured.values]
        line = {"name": name, "program": program, "values": values, **more}
        if measured.why:
            line["why"] = measured.why
        self._lines[name] = line
        self._journal.append(line)
        self._seconds.append({"name": name, "seconds": round(time.time() - self._begun, 3)})

    def recall(self, candidate: Candidate) -> Measured | None:
        """Return what was found of a candidate before."""
        return self.get(f"candidate {candidate.number}", str(candidate.program))

    def remember(self, candidate: Candidate, measured: Measured) -> None:
        """Write what was found of a candidate."""
        self.put(f"candidate {candidate.number}", str(candidate.program), measured, draws=candidate.draws)


def _busy(path: Path) -> str:
    return f"journal {path}: another search is writing it; wait for it, or name another folder"


def _is_whole(line: Mapping[str, Any]) -> bool:
    """Whether a line has all that is read of it, each of its kind."""
    values = line.get("values")
    return (
        all(isinstance(line.get(key), str) for key in ("name", "program"))
        and isinstance(values, list)
        and all(value is None or (type(value) in (int, float) and math.isfinite(value)) for value in values)
    )
