"""Hidden folders beside an output, and what becomes of those that a killed process left there.

Who works in one holds a lock on it, which ends with the process whatever ends that. A folder without a holder is
either half a model, and goes, or the old output whose successor never took its place, and is put back. Its name says on
which machine it was made: locks and process ids of another one tell nothing here, so what that made is left alone.
"""

import contextlib
import functools
import hashlib
import logging
import os
import platform
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pared.errors import ParedError
from pared.io.files import cache_folder, path_of
from pared.io.lock import locked_folder

log = logging.getLogger(__name__)

JUST_MADE = 10.0  # seconds in which who makes a folder comes to lock it
STAGING, REPLACED, SCRATCH = "staging", "replaced", "scratch"
ROOM = len(
    f"..{REPLACED}-01234567-4194304-12345678.extra"
)  # bytes that hidden names beside an output are longer than it


@functools.cache
def this_machine() -> str:
    """Return eight characters that tell this machine from others that may share a file system with it."""
    number = ""
    with contextlib.suppress(OSError):  # two machines may have one name
        number = Path("/etc/machine-id").read_text(encoding="ascii", errors="replace").strip()
    return hashlib.sha256(f"{platform.node()}\0{number}".encode()).hexdigest()[:8]


@contextmanager
def held(out: Path, kind: str) -> Iterator[Path]:
    """Make an empty hidden folder beside an output, held by this process until the end."""
    path = Path(tempfile.mkdtemp(prefix=f".{out.name}.{kind}-{this_machine()}-{os.getpid()}-", dir=out.parent))
    with locked_folder(path, wait=True):  # another process that looks whether it is held has the lock for a moment
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
        remove(path, "what a killed run had begun to write or to remove")
    for path, machine, _ in _made(out, REPLACED):
        if machine != this_machine() and not os.path.lexists(out):
            log.warning("a run on another machine moved %s to %s; if it was killed, move that back", out, path)


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
        whole = path_of(beside).absolute()
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


def discard(folder: Path, out: Path) -> None:
    """Remove a folder beside an output as one step: who is killed meanwhile leaves it whole, or what the next tidies.

    Args:
        folder: beside the output.
        out: the output.

    Raises:
        OSError: it cannot be moved.
    """
    with held(out, STAGING) as gone:
        folder.rename(gone)
        remove(gone)


def remove(path: Path, what: str | None = None) -> None:
    """Remove a hidden folder, and say what it was, or that it cannot be removed."""
    shutil.rmtree(path, ignore_errors=True)
    if path.exists():
        log.warning("%s could not be removed; remove it yourself", path)
    elif what is not None:
        log.warning("removed %s (%s)", path, what)


def _left(out: Path, kind: str) -> list[Path]:
    """Return the hidden folders of a kind beside an output that this machine made and no process holds."""
    return [path for path, machine, pid in _made(out, kind) if machine == this_machine() and not _is_held(path, pid)]


def _made(out: Path, kind: str) -> list[tuple[Path, str, int]]:
    """Return the hidden folders of a kind beside an output, with the machine and the process that made each."""
    name = re.compile(rf"{re.escape(f'.{out.name}.{kind}')}-([0-9a-f]{{8}})-([0-9]{{1,9}})-\w+")
    found: list[Path] = []
    with contextlib.suppress(OSError):
        found = sorted(out.parent.iterdir())
    told = ((path, name.fullmatch(path.name)) for path in found)
    return [(path, one[1], int(one[2])) for path, one in told if one is not None and path.is_dir()]


def _is_held(path: Path, pid: int) -> bool:
    """Whether a process works in a folder: the lock tells; where there are none, whether the process is alive."""
    try:
        with locked_folder(path) as could_lock:
            return _alive(pid) and (not could_lock or time.time() - path.stat().st_mtime < JUST_MADE)
    except OSError:
        return True


def _alive(pid: int) -> bool:
    """Whether a process of this machine runs; where signals do more than ask (Windows), every one does."""
    if os.name == "nt":
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        return True
    return True
