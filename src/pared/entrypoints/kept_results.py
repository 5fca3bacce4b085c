"""Results of several tasks, kept beside the file of ``--json`` as they come, so that a killed command resumes."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

from pared.errors import ParedError
from pared.io.files import is_kept_on_disk, write_whole
from pared.io.journal import Lines, sealed
from pared.io.lock import opened_alone

HEADER, FORMAT = "pared_eval", 1


class Kept:
    """What was measured so far, and in a run before that did not come to its end; a context manager.

    From :meth:`begin` to its end, no other run keeps results beside the same file.

    Args:
        file: of ``--json``; nothing is kept without one, or where that is a pipe or a device.
        note: is told once that a run before is gone on from.
    """

    def __init__(self, file: Path | None, note: Callable[[str], None] = lambda _: None) -> None:
        self._note = note
        self.path: Path | None = None
        if file is not None and is_kept_on_disk(file):
            whole = Path(os.path.realpath(file))
            self.path = whole.with_name(f".{whole.name}.unfinished")
        self._settings: dict[str, Any] = {}
        self._results: dict[str, dict[str, Any]] = {}
        self._file: BinaryIO | None = None
        self._lines: Lines | None = None
        self._begun = False  # whether the file has its first line

    def __enter__(self) -> "Kept":
        return self

    def __exit__(self, *_: object) -> None:
        """Let the next run have the file; one that holds nothing is removed."""
        if self.path is not None and self._file is not None:
            if os.fstat(self._file.fileno()).st_size == 0:
                self.path.unlink(missing_ok=True)
            self._close()

    def begin(self, settings: dict[str, Any]) -> None:
        """Take up what a run before has kept.

        Args:
            settings: everything results depend on, as JSON.

        Raises:
            ParedError: what is kept was measured with other settings, is damaged, or another run is writing it.
        """
        self._settings = json.loads(json.dumps(settings))
        if self.path is not None:
            busy = f"{self.path}: another run is writing it; wait for it, or name another --json"
            self._file = opened_alone(self.path, "results", busy)
            self._recall(self.path, self._file)

    def has(self, task: str) -> bool:
        """Whether a task is done."""
        return task in self._results

    def add(self, task: str, result: dict[str, Any]) -> None:
        """Keep what was measured, on the disk at once."""
        self._results[task] = result
        if self._lines is not None:
            try:
                if not self._begun:
                    self._lines.put(self._header())
                    self._begun = True
                self._lines.put({"task": task, "result": result})
            except OSError as error:
                raise ParedError(f"{self.path}: {error.strerror or error}") from None

    def results(self, tasks: list[str]) -> list[dict[str, Any]]:
        """Return the results of tasks, in this order."""
        return [self._results[task] for task in tasks]

    def finish(self, tasks: list[str]) -> None:
        """Let go of what was kept of tasks, once it is where it belongs; nothing more is added then."""
        for task in tasks:
            self._results.pop(task, None)
        if self.path is None or self._file is None:
            return
        try:
            if self._results:
                write_whole(self.path, self._as_lines())
            else:
                self.path.unlink(missing_ok=True)
        except OSError as error:
            raise ParedError(f"{self.path}: {error.strerror or error}") from None
        self._close()

    def _close(self) -> None:
        if self._file is not None:
            self._file.close()
        self._file = self._lines = None

    def _header(self) -> dict[str, Any]:
        return {HEADER: FORMAT, "settings": self._settings}

    def _as_lines(self) -> bytes:
        """Return what the file holds where only these results were ever kept."""
        content, check = b"", ""
        for fields in (self._header(), *({"task": task, "result": one} for task, one in self._results.items())):
            line, check = sealed(fields, check)
            content += line
        return content

    def _recall(self, path: Path, file: BinaryIO) -> None:
        try:
            self._lines = Lines(file, path, "results", "an evaluation", HEADER)
            self._begun = bool(self._lines.found)
            header, *tasks = self._lines.found or [self._header()]
            settings = dict(header["settings"])
            self._results = {str(one["task"]): dict(one["result"]) for one in tasks}
        except (ParedError, OSError, KeyError, TypeError, ValueError) as error:
            told = str(error) if isinstance(error, ParedError) else f"{type(error).__name__}: {error}"
            raise ParedError(f"{path}, kept by an unfinished run, is not readable ({told}); remove it") from None
        if other := [name for name, value in self._settings.items() if settings.get(name) != value]:
            raise ParedError(
                f"{path} keeps an unfinished run with {other[0]} {settings.get(other[0])!r}, and "
                f"{self._settings[other[0]]!r} is asked for; finish that run, remove the file, or name another --json"
            )
        if self._results:
            self._note(f"resuming after {', '.join(self._results)}, kept in {path}")
