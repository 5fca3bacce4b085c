"""What a search has found so far, on disk: one JSON object a line, each on the disk before the next is begun.

The first line holds the settings, every other one is named by what it tells of (``candidate 17``, ``final 2``). Nothing
in it depends on the clock: the same settings write the same bytes. Seconds go to a second file beside it.
"""

import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

from pared.errors import ParedError
from pared.io.journal import Lines
from pared.io.lock import opened_alone
from pared.search.evolution import Candidate, Measured

FORMAT = 1
HEADER = "pared_search"
SECONDS = "seconds.jsonl"


class Journal:
    """The journal of one search; a context manager, and no two are open on one file at a time.

    A last line that was torn by a crash is dropped. Satisfies :class:`pared.search.evolution.Memory`.

    Attributes:
        path: of the file.
        settings: what the first line holds.
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
        self.path, self.settings = path, json.loads(json.dumps(settings))
        busy = f"journal {path}: another search is writing it; wait for it, or name another folder"
        self._file, beside = opened_alone(path, "journal", busy), path.with_name(SECONDS)
        self._times: BinaryIO | None = None
        try:
            self._journal = Lines(self._file, path, "journal", "a search", HEADER)
            if not self._journal.found:
                self._journal.put({HEADER: FORMAT, **self.settings})
                self._lines: dict[str, dict[str, Any]] = {}
            else:
                self._lines = self._read(*self._journal.found)
            self._times = opened_alone(beside, "seconds", busy)
            self._seconds = Lines(self._times, beside, "seconds", "a search", "name")
        except BaseException:
            self._close()
            raise
        self.resumed = len(self._lines)
        self._begun = time.time()

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    def _close(self) -> None:
        self._file.close()
        if self._times is not None:
            self._times.close()

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
        self._journal.put(line)
        self._seconds.put({"name": name, "seconds": round(time.time() - self._begun, 3)})

    def recall(self, candidate: Candidate) -> Measured | None:
        """Return what was found of a candidate before."""
        return self.get(f"candidate {candidate.number}", str(candidate.program))

    def remember(self, candidate: Candidate, measured: Measured) -> None:
        """Write what was found of a candidate."""
        self.put(f"candidate {candidate.number}", str(candidate.program), measured, draws=candidate.draws)

    def _read(self, first: Mapping[str, Any], *others: dict[str, Any]) -> dict[str, dict[str, Any]]:
        """Return the lines by name, and check the first."""
        settings = dict(first)
        if settings.pop(HEADER, None) != FORMAT:
            raise ParedError(f"journal {self.path}: the first line is not that of a search of format {FORMAT}")
        self._require_same(settings)
        for number, line in enumerate(others, 2):
            if not _is_whole(line):
                raise ParedError(f"journal {self.path}, line {number}: not a line of a search; the file is damaged")
        return {str(line["name"]): line for line in others}

    def _require_same(self, found: Mapping[str, Any]) -> None:
        for name in sorted({*found, *self.settings}):
            there, here = found.get(name), self.settings.get(name)
            if there != here:
                raise ParedError(
                    f"journal {self.path} is of a search with {name} {there!r}, found {here!r} now; resume it with the "
                    "same settings, or name another folder"
                )


def _is_whole(line: Mapping[str, Any]) -> bool:
    """Whether a line has all that is read of it, each of its kind."""
    values = line.get("values")
    return (
        all(isinstance(line.get(key), str) for key in ("name", "program"))
        and isinstance(values, list)
        and all(value is None or (type(value) in (int, float) and math.isfinite(value)) for value in values)
    )
