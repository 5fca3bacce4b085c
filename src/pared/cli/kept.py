"""Results of several tasks, kept beside the file of ``--json`` as they come, so that a killed command goes on."""

import json
from pathlib import Path
from typing import Any

from pared.cli.console import err, write_json
from pared.errors import ParedError


class Kept:
    """What was measured so far, and in a run before that did not come to its end.

    Args:
        file: of ``--json``; without one nothing is kept.
    """

    def __init__(self, file: Path | None) -> None:
        self.path = None if file is None else file.with_name(f".{file.name}.unfinished")
        self._settings: dict[str, Any] = {}
        self._results: dict[str, dict[str, Any]] = {}

    def begin(self, settings: dict[str, Any]) -> None:
        """Take up what a run before has kept.

        Args:
            settings: everything results depend on, as JSON.

        Raises:
            ParedError: what is kept was measured with other settings, or is unreadable.
        """
        self._settings = json.loads(json.dumps(settings))
        if self.path is not None and self.path.exists():
            self._recall(self.path)

    def has(self, task: str) -> bool:
        """Whether a task is done."""
        return task in self._results

    def add(self, task: str, result: dict[str, Any]) -> None:
        """Keep what was measured."""
        self._results[task] = result
        self._write()

    def results(self, tasks: list[str]) -> list[dict[str, Any]]:
        """Return the results of tasks, in this order."""
        return [self._results[task] for task in tasks]

    def finish(self, tasks: list[str]) -> None:
        """Let go of what was kept of tasks, once it is where it belongs."""
        for task in tasks:
            del self._results[task]
        if self._results:
            self._write()
        elif self.path is not None:
            self.path.unlink(missing_ok=True)

    def _write(self) -> None:
        write_json(self.path, {"settings": self._settings, "tasks": self._results})

    def _recall(self, path: Path) -> None:
        try:
            kept = json.loads(path.read_text(encoding="utf-8"))
            settings, self._results = dict(kept["settings"]), {task: dict(one) for task, one in kept["tasks"].items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ParedError(f"{path}, kept by an unfinished run, is not readable ({error}); remove it") from None
        if other := [name for name, value in self._settings.items() if settings.get(name) != value]:
            raise ParedError(
                f"{path} keeps an unfinished run with {other[0]} {settings.get(other[0])!r}, and "
                f"{self._settings[other[0]]!r} is asked for; finish that run, remove the file, or name another --json"
            )
        err.print(f"note: going on after {', '.join(self._results)}, kept in {path}", markup=False)
