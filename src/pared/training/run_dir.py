"""The folder a training works in, beside its output: state to resume from after a crash, finished stages."""

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from pared.errors import ParedError
from pared.io.files import write_whole
from pared.io.guarded import read_json
from pared.io.lock import locked
from pared.training.distributed import Processes

SETTINGS, WHOLE = "settings.json", "WHOLE"
CHECKPOINT = "checkpoint-"


class Workshop:
    """Checkpoints and finished stages of one training; nothing else may work in it at the same time.

    Attributes:
        folder: beside the output, hidden; removed when the output is there.
        resumed: whether it was there already, begun by the very same training.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        self.folder = folder
        self.resumed = False
        self._settings = json.loads(json.dumps(settings))

    @classmethod
    @contextmanager
    def beside(cls, out: Path, settings: Mapping[str, Any], processes: Processes) -> Iterator["Workshop"]:
        """Open the work folder of an output folder; it goes again if there is nothing in it to resume from.

        Args:
            out: the output.
            settings: everything a result depends on, as JSON has it.
            processes: that train together; the first holds the lock.

        Raises:
            ParedError: it holds the state of another training, or another process works in it.
        """
        folder = out.absolute().parent / f".{out.name}.training"
        folder.mkdir(parents=True, exist_ok=True)
        busy = f"{folder}: another process is training this output; wait for it, or name another folder"
        workshop = cls(folder, settings)
        workshop.resumed = (folder / SETTINGS).exists()
        processes.wait()
        with locked(folder / "lock", busy) if processes.is_first else nullcontext():
            processes.first(workshop._open)
            try:
                yield workshop
            finally:
                if processes.is_first and workshop.folder.exists() and not workshop.holds_anything():
                    workshop.close()

    def stage(self, number: int) -> Path:
        """Return where a finished stage lies as an ordinary folder."""
        return self.folder / f"stage-{number}"

    def state(self, number: int) -> Path:
        """Return where a stage that is being trained keeps its checkpoints."""
        return self.folder / f"state-{number}"

    def holds_anything(self) -> bool:
        """Whether there is anything to resume from: a whole checkpoint, or a finished stage."""
        return any(self.folder.glob(f"state-*/{CHECKPOINT}*/{WHOLE}")) or any(self.folder.glob("stage-*"))

    def last_checkpoint(self, number: int) -> Path | None:
        """Return the newest checkpoint of a stage that was written to its end."""
        found = [path for path in self.state(number).glob(f"{CHECKPOINT}*") if (path / WHOLE).exists()]
        return max(found, key=lambda path: int(path.name.removeprefix(CHECKPOINT)), default=None)

    def forget(self, number: int) -> None:
        """Remove the checkpoints of a stage."""
        shutil.rmtree(self.state(number), ignore_errors=True)

    def close(self) -> None:
        """Remove everything, once the output is there."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _open(self) -> None:
        path = self.folder / SETTINGS
        if path.exists():
            self._require_same(path)
            return
        write_whole(path, json.dumps(self._settings, indent=2) + "\n")

    def _require_same(self, path: Path) -> None:
        try:
            found = dict(read_json(path, "settings"))
        except (ParedError, TypeError, ValueError) as error:
            raise ParedError(f"{path}: unreadable ({error}); remove the folder {self.folder} to begin anew") from None
        for name in sorted({*found, *self._settings}):
            there, here = found.get(name), self._settings.get(name)
            if there != here:
                raise ParedError(
                    f"{self.folder} holds an unfinished training with {name} {there!r}, found {here!r} now; resume "
                    "with the same settings, name another output, or remove that folder to begin anew"
                )


def mark_whole(checkpoint: Path) -> None:
    """Say that a checkpoint was written to its end, when its files are on the disk."""
    for file in checkpoint.iterdir():
        with file.open("rb") as handle:
            os.fsync(handle.fileno())
    (checkpoint / WHOLE).touch()
