"""Two folders change places in one step, where the system can do that."""

import ctypes
import errno
import os
import sys
from pathlib import Path

AT_FDCWD, RENAME_EXCHANGE, RENAME_SWAP = -100, 2, 2  # linux/fs.h; macOS sys/stdio.h
UNABLE = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP)


def exchange(one: Path, other: Path) -> bool:
    """Let two paths of one file system change places atomically.

    Returns:
        False if this system or file system cannot; nothing has changed then.

    Raises:
        OSError: it can, and it went wrong.
    """
    try:
        library = ctypes.CDLL(None, use_errno=True)
        first, second = os.fsencode(one), os.fsencode(other)
        if sys.platform == "darwin":
            failed = library.renamex_np(first, second, ctypes.c_uint(RENAME_SWAP))
        else:
            at = ctypes.c_int(AT_FDCWD)
            failed = library.renameat2(at, first, at, second, ctypes.c_uint(RENAME_EXCHANGE))
    except (AttributeError, OSError, TypeError):  # no such call here
        return False
    if not failed:
        return True
    number = ctypes.get_errno()
    if number in UNABLE:
        return False
    raise OSError(number, os.strerror(number), str(one), None, str(other))
