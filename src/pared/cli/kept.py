"""Results of several tasks, kept beside the file of ``--json`` as they come, so that a killed command goes on."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pared.cli.console import err
from pared.errors import ParedError
from pared.files import is_kept_on_disk
from pared.lines import Lines
from pared.locking import lock

HEADER, FORMAT = "pared_eval", 1


class Kept:
    """What was measured so far, and in a run before that did not come to its end.

    Args:
        file: of ``--json``; nothing is kept without one, or where that is a pipe or a device.
    """

    def __init__(self, file: Path | None) -> None:
        self.path: Path | None = None
        if file is not None and is_kept_on_disk(file):
            whole = Path(os.path.realpath(file))
            self.path = whole.with_name(f".{whole.name}.unfinished")
        self._settings: dict[str, Any] = {}
        self._results: dict[str, dict[str, Any]] = {}

    def begin(self, settings: dict[str, Any]) -> None:
        """Take up what a run before has kept.

        Args:
            settings: everything results depend on, as JSON.

        Raises:
            ParedError: what is kept was measured with other settings, is damaged, or another run is writing it.
        """
        self._settings = json.loads(json.dumps(settings))
        if self.path is not None and self.path.exists():
            self._recall(self.path)

    def has(self, task: str) -> bool:
        """Whether a task is done."""
        return task in self._results

    def add(self, task: str, result: dict[str, Any]) -> None:
        """Keep what was measured, on the disk at once."""
        self._results[task] = result
        if self.path is not None:
            self._keep(self.path, task, result)

    def results(self, tasks: list[str]) -> list[dict[str, Any]]:
        """Return the results of tasks, in this order."""
        return [self._results[task] for task in tasks]

    def finish(self, tasks: list[str]) -> None:
        """Let go of what was kept of tasks, once it is where it belongs."""
        for task in tasks:
            del self._results[task]
        if self.path is None:
            return
        self.path.unlink(missing_ok=True)
        for task, result in self._results.items():
            self._keep(self.path, task, result)

    def _keep(self, path: Path, task: str, result: dict[str, Any]) -> None:
        """Write a line, after one of the settings if it is the first."""
        with self._opened(path) as lines:
            if not lines.found:
                lines.put({HEADER: FORMAT, "settings": self._settings})
            lines.put({"task": task, "result": result})

    @contextmanager
    def _opened(self, path: Path) -> Iterator[Lines]:
        try:
            with path.open("a+b") as file:
                lock(file, f"{path}: another run is writing it; wait for it, or name another --json")
                yield Lines(file, path, "results", "an evaluation", HEADER)
        except OSError as error:
            raise ParedError(f"{path}: {error.strerror or error}") from None

    def _recall(self, path: Path) -> None:
        try:
            with self._opened(path) as lines:
                header, *tasks = lines.found or [{HEADER: FORMAT, "settings": self._settings}]
            settings = dict(header["settings"])
            self._results = {str(one["task"]): dict(one["result"]) for one in tasks}
        except (ParedError, KeyError, TypeError, ValueError) as error:
            told = str(error) if isinstance(error, ParedError) else f"{type(error).__name__}: {error}"
            raise ParedError(f"{path}, kept by an unfinished run, is not readable ({told}); remove it") from None
        if other := [name for name, value in self._settings.items() if settings.get(name) != value]:
            raise ParedError(
                f"{path} keeps an unfinished run with {other[0]} {settings.get(other[0])!r}, and "
                f"{self._settings[other[0]]!r} is asked for; finish that run, remove the file, or name another --json"
            )
        if self._results:
            err.print(f"note: going on after {', '.join(self._results)}, kept in {path}", markup=False)
