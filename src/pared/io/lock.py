"""One process at a time, where the system can say so."""

import contextlib
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


def opened_alone(path: Path, what: str, busy: str) -> BinaryIO:
    """Open a file to read and append, made if it is not there, and hold its lock until it is closed.

    Args:
        path: of it.
        what: it is, for messages.
        busy: the message where another process has it.

    Raises:
        ParedError: another process has it, it is not a regular file, or it cannot be opened.
    """
    while True:
        try:
            if path.exists() and not path.is_file():
                raise ParedError(f"{what} {path}: not a regular file; move it, or name another")
            file = path.open("a+b")
        except OSError as error:
            raise ParedError(f"{what} {path}: {error.strerror or error}") from None
        try:
            lock(file, busy)
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                    return file
        except BaseException:
            file.close()
            raise
        file.close()  # replaced or removed between opening and locking, by its previous holder


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


@contextmanager
def folder_alone(path: Path, busy: str) -> Iterator[None]:
    """Make a folder if it is not there, and hold its lock; the lock moves with the folder and ends with the process.

    Raises:
        ParedError: another process holds it; the message is ``busy``.
        OSError: the folder cannot be made or opened.
    """
    while True:
        path.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as stack:
            try:
                found = path.stat()
                stack.enter_context(locked_folder(path))
                held = os.path.samestat(found, path.stat())
            except FileNotFoundError:
                continue
            except BlockingIOError:
                raise ParedError(busy) from None
            if held:
                yield
                return
