"""Small files that appear whole, and the folder of the user's cache."""

import contextlib
import os
import tempfile
from pathlib import Path

import platformdirs


def cache_folder() -> Path:
    """Return the user's cache folder of pared, ``PARED_CACHE`` if that is set."""
    return Path(os.environ.get("PARED_CACHE") or platformdirs.user_cache_dir("pared"))


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file beside its place and rename it: who reads it finds the old content or the new, never a part.

    What it replaces keeps its permissions. A link is replaced, not followed; resolve the path where that matters.

    Args:
        path: of the file; its folder is there.
        content: UTF-8 text, or bytes.

    Raises:
        OSError: it cannot be written; nothing has changed.
    """
    raw = content.encode() if isinstance(content, str) else content
    handle, name = tempfile.mkstemp(prefix=".pared-", suffix=".partial", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(raw)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, path.stat().st_mode & 0o777 if path.is_file() else 0o666 & ~_umask())
        os.replace(name, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise


def _umask() -> int:
    """Return the mask of permissions of new files, which can only be read by setting it."""
    mask = os.umask(0o022)
    os.umask(mask)
    return mask
