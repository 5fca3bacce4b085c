"""Results of several tasks, kept beside the file of ``--json`` as they come, so that a killed command resumes."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pared.errors import ParedError
from pared.io.files import is_kept_on_disk, path_of
from pared.io.guarded import MOST_BYTES, parse_json, read_bytes
from pared.io.journal import Journal
from pared.names import anew, ways_on

HEADER, FORMAT = "pared_eval", 1


def is_results(name: str) -> bool:
    """Return whether a name is of a file that ``pared eval --json`` wrote, and of no model."""
    return name.endswith(".json") and path_of(name).is_file()


def read_results(name: str) -> dict[str, Any]:
    """Return what an earlier ``pared eval --json`` wrote.

    Raises:
        ParedError: it is no such file.
    """
    found = parse_json(read_bytes(path_of(name), "results", MOST_BYTES), f"results {name}")
    if not isinstance(found, dict) or "model" not in found or not {"tasks", "perplexity"} & set(found):
        raise ParedError(f"results {name}: expected what pared eval --json writes, with a perplexity or tasks")
    return found


class Kept:
    """What was measured so far, and in a run before that did not come to its end; a context manager.

    From :meth:`begin` to its end, no other run keeps results beside the same file.

    Args:
        file: of ``--json``; nothing is kept without one, or where that is a pipe or a device.
        note: is called once where an earlier run is resumed.
        resume: take up what an earlier run has kept, or remove it; None refuses both.
    """

    def __init__(
        self, file: Path | None, note: Callable[[str], None] = lambda _: None, resume: bool | None = True
    ) -> None:
        self._note, self._resume = note, resume
        self.path: Path | None = None
        if file is not None and is_kept_on_disk(file):
            whole = Path(os.path.realpath(file))
            self.path = whole.with_name(f".{whole.name}.unfinished")
        self._results: dict[str, dict[str, Any]] = {}
        self._journal: Journal | None = None
        self._others: list[Kept] = []

    def of_other(self) -> "Kept":
        """Return what keeps the results of a second model of the same run, beside these; it ends with them."""
        file = None if self.path is None else self.path.with_name(f"{self.path.name.removeprefix('.')}.against")
        self._others.append(Kept(file, self._note, self._resume))
        return self._others[-1]

    def __enter__(self) -> "Kept":
        return self

    def __exit__(self, *_: object) -> None:
        """Let the next run have the file; one that holds nothing is removed."""
        self._close()

    def begin(self, settings: dict[str, Any]) -> None:
        """Take up what a run before has kept.

        Args:
            settings: everything results depend on, as JSON.

        Raises:
            ParedError: what is kept was measured with other settings, or with these and ``resume`` is None; it is
                damaged, or another run is writing it.
        """
        if self.path is None:
            return
        busy = f"{self.path}: another run is writing it; wait for it, or name another --json"
        if self._resume is False:
            Journal.remove(self.path, "results", busy)
        self._journal = Journal(
            self.path,
            {HEADER: FORMAT, **settings},
            what="results",
            of="an evaluation",
            busy=busy,
            advice=f"finish that run, start over ({anew()}), or name another --json",
        )
        try:
            self._results = {str(one["task"]): dict(one["result"]) for one in self._journal.entries}
        except (KeyError, TypeError, ValueError) as error:
            self._close()
            raise ParedError(f"results {self.path}: a line names no task or no result ({error}); remove it") from None
        if self._results and self._resume is None:
            done = ", ".join(self._results)
            self._close()
            raise ParedError(f"{self.path} holds results of an unfinished run ({done}): {ways_on()}")
        if self._resume and not self._results:
            self._note(f"nothing to resume: no results are kept in {self.path}")
        if self._results:
            self._note(f"resuming after {', '.join(self._results)}, kept in {self.path}")

    def has(self, task: str) -> bool:
        """Whether a task is done."""
        return task in self._results

    def add(self, task: str, result: dict[str, Any]) -> None:
        """Keep what was measured, on the disk at once."""
        self._results[task] = result
        if self._journal is not None:
            self._journal.append({"task": task, "result": result})

    def results(self, tasks: list[str]) -> list[dict[str, Any]]:
        """Return the results of tasks, in this order."""
        return [self._results[task] for task in tasks]

    def finish(self, tasks: list[str]) -> None:
        """Release what was kept of tasks, once it is where it belongs; nothing more is added then."""
        for other in self._others:
            other.finish(tasks)
        for task in tasks:
            self._results.pop(task, None)
        if self._journal is not None:
            self._journal.replace({"task": task, "result": one} for task, one in self._results.items())
        self._close()

    def _close(self) -> None:
        for other in self._others:
            other._close()
        if self._journal is not None:
            self._journal.close()
        self._journal = None
