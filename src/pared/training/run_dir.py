"""What a training keeps beside its output until it is done: checkpoints, finished stages, what was measured."""

import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from pared.io.files import sync
from pared.io.run_dir import RunDirectory, entries_of, run_folder
from pared.processes import Processes

KIND, WHOLE = "training", "WHOLE"
CHECKPOINT = "checkpoint-"


class TrainingRun:
    """Checkpoints and finished stages of one training, for all its processes; the first of them holds the folder.

    Attributes:
        folder: beside the output, hidden; removed when the output is there.
        resumed: whether it was there already, begun by the very same training; only the first process knows.
    """

    def __init__(self, folder: Path, directory: RunDirectory | None) -> None:
        self.folder, self._directory = folder, directory
        self.resumed = directory is not None and directory.resumed

    @classmethod
    @contextmanager
    def beside(
        cls, out: Path, settings: Mapping[str, Any], processes: Processes, resume: bool | None = True
    ) -> Iterator["TrainingRun"]:
        """Open the state of a training beside its output; it goes again if there is nothing in it to resume from.

        Args:
            out: the output.
            settings: everything a result depends on, as JSON has it.
            processes: that train together.
            resume: as of :meth:`pared.io.run_dir.RunDirectory.open`.

        Raises:
            ParedError: it holds the state of another training, or another process works in it.
        """
        with ExitStack() as stack:
            opened = RunDirectory.open(out, KIND, settings, resume, _holds_anything)
            ours: list[RunDirectory] = []
            processes.first(lambda: ours.append(stack.enter_context(opened)))
            yield cls(run_folder(out, KIND), ours[0] if ours else None)

    def stage(self, number: int) -> Path:
        """Return where a finished stage lies as an ordinary folder."""
        return self.folder / f"stage-{number}"

    def state(self, number: int) -> Path:
        """Return where a stage that is being trained keeps its checkpoints."""
        return self.folder / f"state-{number}"

    def last_checkpoint(self, number: int) -> Path | None:
        """Return the newest checkpoint of a stage that was written to its end."""
        found = [path for path in self.state(number).glob(f"{CHECKPOINT}*") if (path / WHOLE).exists()]
        return max(found, key=lambda path: int(path.name.removeprefix(CHECKPOINT)), default=None)

    def record(self, what: str, of: str | int, value: Any) -> None:
        """Have it on the disk that something is done; only the first process may.

        Args:
            what: was done: ``stage``.
            of: which: its number.
            value: what came of it, as JSON has it.
        """
        assert self._directory is not None
        self._directory.journal.append({what: of, "result": value})

    def recorded(self, what: str, of: str | int) -> Any:
        """Return what came of something that is done, in any process; None if it is not."""
        entries = entries_of(self.folder, KIND) if self._directory is None else self._directory.journal.entries
        return next((entry["result"] for entry in entries if entry.get(what) == of), None)

    def forget(self, number: int) -> None:
        """Remove the checkpoints of a stage."""
        shutil.rmtree(self.state(number), ignore_errors=True)

    def close(self) -> None:
        """Remove everything, once the output is there."""
        if self._directory is not None:
            self._directory.finish()


def mark_whole(checkpoint: Path) -> None:
    """Say that a checkpoint was written to its end, when its files are on the disk."""
    for file in checkpoint.iterdir():
        sync(file)
    (checkpoint / WHOLE).touch()
    sync(checkpoint)


def _holds_anything(folder: Path) -> bool:
    """Whether there is anything to resume from: a whole checkpoint, or a finished stage."""
    return any(folder.glob(f"state-*/{CHECKPOINT}*/{WHOLE}")) or any(folder.glob("stage-*"))
