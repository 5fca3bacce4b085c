"""One process at a time, where the system can say so."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from pared.errors import ParedError


def lock(file: BinaryIO, busy: str) -> None:
    """Lock an open file for this process until it is closed; nothing happens on systems without such locks.

    Raises:
        ParedError: another process has it; the message is ``busy``.
    """
    try:
        import fcntl  # not on Windows

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ParedError(busy) from None
    except (ImportError, OSError):  # no such locks here, as on some network file systems
        pass


@contextmanager
def locked(path: Path, busy: str) -> Iterator[None]:
    """Hold the lock of a file, made if it is not there.

    Raises:
        ParedError: another process holds it; the message is ``busy``.
    """
    with path.open("a+b") as file:
        lock(file, busy)
        yield


@contextmanager
def locked_folder(path: Path, wait: bool = False) -> Iterator[bool]:
    """Hold the lock of a folder itself, which moves with it and ends with the process.

    Args:
        path: of the folder.
        wait: until no other process holds it.

    Yields:
        Whether this system and file system has such locks.

    Raises:
        BlockingIOError: another process holds it, and ``wait`` is not asked for.
        OSError: the folder cannot be opened.
    """
    try:
        import fcntl  # not on Windows
    except ImportError:
        yield False
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        could = True
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            raise
        except OSError:  # as on some network file systems
            could = False
        yield could
    finally:
        os.close(handle)
