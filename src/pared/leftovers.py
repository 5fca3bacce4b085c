"""Hidden folders beside an output, and what becomes of those that a killed process left there.

Who works in one holds a lock on it, which ends with the process whatever ends that. A folder that nobody holds is
either half a model, and goes, or the old output whose successor never took its place, and is put back.
"""

import contextlib
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pared.errors import ParedError
from pared.files import cache_folder
from pared.locking import locked_folder

log = logging.getLogger(__name__)

JUST_MADE = 10.0  # seconds in which who makes a folder comes to lock it
STAGING, REPLACED, SCRATCH = "staging", "replaced", "scratch"
ROOM = len(f"..{REPLACED}-4194304-12345678.extra")  # bytes that hidden names beside an output are longer than it


@contextmanager
def held(out: Path, kind: str) -> Iterator[Path]:
    """Make an empty hidden folder beside an output, held by this process until the end."""
    path = Path(tempfile.mkdtemp(prefix=f".{out.name}.{kind}-{os.getpid()}-", dir=out.parent))
    with locked_folder(path):
        yield path


def tidy(out: Path) -> None:
    """Put back or remove what killed processes left beside an output, and say so."""
    for path in _left(out, REPLACED):
        if any(path.iterdir()) and not os.path.lexists(out):
            path.rename(out)
            log.warning("a run that was killed had moved %s aside; it is back in its place", out)
        else:
            remove(path, "the output that a killed run had replaced")
    for path in _left(out, STAGING):
        old = path / out.name  # where pared 0.1 kept what it replaced
        if old.is_dir() and not os.path.lexists(out):
            old.rename(out)
            log.warning("a run that was killed had moved %s aside; it is back in its place", out)
        remove(path, "what a killed run had begun to write or to remove")


@contextmanager
def scratch(beside: Path | None) -> Iterator[Path]:
    """Give a temporary folder for large files, gone at the end; what killed processes left there goes first.

    Args:
        beside: the output it is for; without one, or where nothing can be written beside it, the folder lies in the
            user's cache folder, or where that cannot be written either, in the system's folder of temporary files.
    """
    place = _scratch_place(beside)
    for path in _left(place, SCRATCH):
        remove(path, "temporary files of a killed run")
    with held(place, SCRATCH) as folder:
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def _scratch_place(beside: Path | None) -> Path:
    """Return what temporary folders are named after, in a folder that can be written to."""
    if beside is not None:
        whole = beside.expanduser().absolute()
        place = next(folder for folder in whole.parents if folder.is_dir())
        if os.access(place, os.W_OK):
            return place / whole.name
    for place in (
        cache_folder() / SCRATCH,
        Path(tempfile.gettempdir()) / f"pared-{SCRATCH}-{getattr(os, 'getuid', int)()}",
    ):
        with contextlib.suppress(OSError):
            place.mkdir(mode=0o700, parents=True, exist_ok=True)
            if os.access(place, os.W_OK):
                return place / "work"
    raise ParedError("no folder for temporary files can be written to; set PARED_CACHE to one that can")


def remove(path: Path, what: str | None = None) -> None:
    """Remove a hidden folder, and say what it was, or that it cannot be removed."""
    shutil.rmtree(path, ignore_errors=True)
    if path.exists():
        log.warning("%s could not be removed; remove it yourself", path)
    elif what is not None:
        log.warning("removed %s (%s)", path, what)


def _left(out: Path, kind: str) -> list[Path]:
    """Return the hidden folders of a kind beside an output that no process holds."""
    prefix, found = f".{out.name}.{kind}-", []
    with contextlib.suppress(OSError):
        found = [path for path in sorted(out.parent.iterdir()) if path.name.startswith(prefix) and path.is_dir()]
    return [path for path in found if not _is_held(path, path.name.removeprefix(prefix).partition("-")[0])]


def _is_held(path: Path, pid: str) -> bool:
    """Whether a process works in a folder: the lock tells; where there are none, whether the process is alive."""
    try:
        with locked_folder(path) as could_lock:
            alive = not pid.isdigit() or _alive(int(pid))
            return alive and (not could_lock or time.time() - path.stat().st_mtime < JUST_MADE)
    except (BlockingIOError, OSError):
        return True


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        return True
    return True
