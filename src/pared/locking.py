"""One process at a time, where the system can say so."""

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
