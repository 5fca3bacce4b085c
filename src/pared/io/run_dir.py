"""What a run keeps beside its output until it is done, so that the next process resumes where one was killed.

A hidden folder ``.NAME.KIND`` holds everything: what the run depends on, a journal, and files that appear whole. Its
name holds neither machine nor process: the next run of the same output finds it. So :func:`pared.io.leftovers.tidy`,
which removes what killed processes left, leaves it alone; it goes when the output is there, or a run starts over.

One rule holds for every command: unfinished work is neither taken up nor removed unless the caller says which.
``resume`` is that choice: True takes it up, False starts over, None refuses where there is any.
"""

import logging
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from pared.errors import ParedError
from pared.io.files import PARTIAL, appearing, is_full, sync, write_whole
from pared.io.fingerprint import as_json, require_same
from pared.io.guarded import read_bytes
from pared.io.journal import Journal, opened, read_entries, sealed
from pared.io.leftovers import discard, scratch
from pared.io.lock import folder_alone
from pared.names import anew, ways_on

log = logging.getLogger(__name__)

SETTINGS, JOURNAL = "settings.json", "journal.jsonl"
MARK, FORMAT = "pared_run", 1
COMPRESSION = "compress"  # the kind of a compression's run


class RunDirectory:
    """The state of one run; no other process works in it at the same time.

    Attributes:
        folder: where it lies.
        journal: what the run has done so far, a line each.
        resumed: whether the folder was there already, left by the very same run.
        durable: whether the state is to outlive the process.
    """

    def __init__(self, folder: Path, kind: str, out: Path | None = None) -> None:
        """Open the journal of a folder; see :meth:`open` and :meth:`temporary`.

        Args:
            folder: that is there and held.
            kind: of run.
            out: the output that it lies beside; without one it need not outlive the process.
        """
        self.folder, self.resumed, self.durable, self._out = folder, False, out is not None, out
        self.journal = Journal(folder / JOURNAL, {MARK: FORMAT}, of=f"a {kind} run", advice=_anew(folder))

    @classmethod
    @contextmanager
    def open(
        cls,
        out: Path,
        kind: str,
        fingerprint: Mapping[str, Any],
        resume: bool | None = True,
        worth: Callable[[Path], bool] | None = None,
    ) -> Iterator["RunDirectory"]:
        """Open the state of a run beside its output, or begin one.

        Args:
            out: the output.
            kind: of run, as part of the folder's name: ``training``.
            fingerprint: everything a result depends on, as JSON has it.
            resume: take up what a process before has left, or remove it; None refuses both.
            worth: whether there is anything to resume from in a folder; what has nothing is removed. If none is given,
                any line of the journal is.

        Raises:
            ParedError: another process works in the folder, it holds the state of a run with another fingerprint, or of
                any with ``resume`` None, or that state is damaged; says what differs, and what to do.
        """
        folder = run_folder(out, kind)
        busy = f"{folder}: another process is at work on this output; wait for it, or name another folder"
        worth = worth or (lambda folder: bool(entries_of(folder, kind)))
        with ExitStack() as stack:
            try:
                if resume is not True and folder.exists():
                    with folder_alone(folder, busy):
                        if resume is None:
                            _require_nothing(folder, fingerprint, worth)
                        elif any(folder.iterdir()):
                            log.warning("%s, left by a run that did not end, was removed: this one starts over", folder)
                        if resume is False or settings_of(folder) is not None:
                            discard(folder, out.absolute())
                stack.enter_context(folder_alone(folder, busy))
                resumed = _take_up(folder, fingerprint)
                run = cls(folder, kind, out.absolute())
                run.journal.begin()
            except OSError as error:
                raise ParedError(f"{folder}: {error.strerror or error} ({error.filename})") from None
            run.resumed = resumed
            try:
                yield run
            finally:
                run.journal.close()
                if folder.exists() and not worth(folder):
                    run.finish()

    @classmethod
    @contextmanager
    def temporary(cls, beside: Path | None = None) -> Iterator["RunDirectory"]:
        """Give a state that no process takes up after this one: of a run without an output.

        Args:
            beside: what its folder lies beside; the user's cache folder if none.
        """
        with scratch(beside) as folder:
            run = cls(folder, "temporary")
            try:
                yield run
            finally:
                run.journal.close()

    @contextmanager
    def commit_file(self, name: str, needed: int = 0) -> Iterator[Path]:
        """Give a path to write a file to, which then takes its place under a name, whole and on the disk.

        Args:
            name: of the file in the folder.
            needed: bytes it will have, about; where the disk has fewer, nothing is written.

        Raises:
            ParedError: the disk is full, or writing failed; what was committed before is as it was.
        """
        path = self.folder / name
        free = shutil.disk_usage(self.folder).free
        if free < needed:
            raise ParedError(_full(path, needed, free))
        try:
            with appearing(path, self.durable) as partial:
                yield partial
                needed = max(needed, partial.stat().st_size)
        except (OSError, SafetensorError) as error:
            if is_full(error):
                raise ParedError(_full(path, needed, shutil.disk_usage(self.folder).free)) from None
            raise ParedError(f"{path} could not be written ({error}); the state of the run is as it was") from error

    def finish(self) -> None:
        """Remove the folder, once the output is there."""
        self.journal.close()
        if self._out is not None:
            discard(self.folder, self._out)


def run_folder(out: Path, kind: str) -> Path:
    """Return where a run of an output keeps its state."""
    whole = out.absolute()
    return whole.parent / f".{whole.name}.{kind}"


def settings_of(folder: Path) -> dict[str, Any] | None:
    """Return the fingerprint of the run that a folder holds, None where it holds none.

    Raises:
        ParedError: it is damaged.
    """
    settings = folder / SETTINGS
    if not settings.exists():
        return None
    content = read_bytes(settings, "settings")
    found = opened(content.removesuffix(b"\n"))
    if found is None or not (found[1] or content.startswith(b"{\n")):  # once written without a checksum, in many lines
        raise _damaged(folder, f"settings {settings}: not what was written, by its checksum")
    return found[0]


def entries_of(folder: Path, kind: str) -> list[dict[str, Any]]:
    """Return the entries of a run's journal, in a process that does not hold the run.

    Raises:
        ParedError: it is damaged.
    """
    return read_entries(folder / JOURNAL, MARK, of=f"a {kind} run")


def _take_up(folder: Path, fingerprint: Mapping[str, Any]) -> bool:
    """Return whether a folder holds the state of this very run; if it is empty, make it this run's."""
    for path in folder.glob(f"*{PARTIAL}"):  # of a process that was killed as it wrote
        path.unlink()
    settings, journal = folder / SETTINGS, folder / JOURNAL
    if (found := settings_of(folder)) is not None:
        _require_same(folder, found, fingerprint)
        files = sorted(path.name for path in folder.iterdir() if path not in (settings, journal))
        if files and not (journal.is_file() and journal.stat().st_size):  # it is begun before any file is written
            raise _damaged(folder, f"{JOURNAL}, which tells what {files[0]} is, is empty or missing")
        return True
    if others := [path.name for path in folder.iterdir() if path.name != JOURNAL]:
        raise ParedError(f"{folder} holds {others[0]} and no {SETTINGS}: it is not the state of a run, or is damaged; "
                         "remove it, or name another output")  # fmt: skip
    (folder / JOURNAL).unlink(missing_ok=True)
    write_whole(settings, sealed(as_json(fingerprint))[0])
    sync(folder)
    return False


def _require_nothing(folder: Path, fingerprint: Mapping[str, Any], worth: Callable[[Path], bool]) -> None:
    """Refuse a folder that holds something worth to be resumed, of this run or another."""
    found = settings_of(folder)
    if found is not None and worth(folder):
        _require_same(folder, found, fingerprint)
        raise ParedError(f"{folder} holds an unfinished run of these very settings: {ways_on()}")


def _require_same(folder: Path, found: Mapping[str, Any], fingerprint: Mapping[str, Any]) -> None:
    require_same(found, fingerprint, f"{folder} holds an unfinished run with other settings", _anew(folder))


def _damaged(folder: Path, what: str) -> ParedError:
    return ParedError(f"{folder} holds an unfinished run, and it is damaged: {what}; restore that file, or start over "
                      f"({anew()})")  # fmt: skip


def _anew(folder: Path) -> str:
    return f"resume with the same settings, name another output, or start over ({anew()}), which removes {folder}"


def _full(path: Path, needed: int, free: int) -> str:
    return (f"not enough disk for {path}: {needed:,} bytes needed, {free:,} free; the state of the run is as it was: "
            "make room and resume")  # fmt: skip
