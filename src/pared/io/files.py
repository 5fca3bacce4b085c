"""Small files that appear whole, files a user names that may be none, and the folder of the user's cache."""

import contextlib
import errno
import functools
import os
import re
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import platformdirs

DESCRIPTOR = re.compile(r"/dev/std(?P<name>in|out|err)|(?:/dev/fd|/proc/(?P<process>self|\d+)/fd)/(?P<number>\d+)")
STANDARD = {"in": 0, "out": 1, "err": 2}
PARTIAL = ".partial"  # what the name of a file ends with until it is whole
LONGEST_NAME = 255  # bytes, with what stands beside it for a while
LINKS = 40  # as many as systems follow
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # of errors: no space, a quota, a limit on the size of files
NUMPY_FULL = re.compile(r"\d+ requested and \d+ written")
_MASK = threading.Lock()


def path_of(name: str | Path) -> Path:
    """Return the path that a user names, with ``~`` written out; as it stands where there is no such user or home.

    Whether something is there is asked with ``os.path``, which has no error for a name that no disk can hold.
    """
    return Path(os.path.expanduser(name))


def cache_folder() -> Path:
    """Return the user's cache folder of pared, ``PARED_CACHE`` if that is set."""
    return Path(os.environ.get("PARED_CACHE") or platformdirs.user_cache_dir("pared"))


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file beside its place and rename it: a reader finds the old content or the new, never a part.

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
        os.chmod(name, path.stat().st_mode & 0o777 if path.is_file() else new_mode())
        os.replace(name, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise


@contextlib.contextmanager
def appearing(path: Path, durable: bool = True) -> Iterator[Path]:
    """Give a path beside a file to write it to; it takes its place, whole, or is gone if anything goes wrong.

    Args:
        path: of the file.
        durable: whether it, and its name, are on the disk afterwards.

    Raises:
        OSError: it cannot be written; what was there is as it was.
    """
    partial = path.with_name(f"{path.name}{PARTIAL}")
    try:
        yield partial
        if durable:
            sync(partial)
        os.replace(partial, path)
        if durable:
            sync(path.parent)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise


def sync(path: Path) -> None:
    """Have a file, or the names in a folder, on the disk before anything else happens; where folders cannot be, not.

    Raises:
        OSError: it could not be written.
    """
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EACCES, errno.EBADF):  # not for folders there
            raise
    finally:
        os.close(handle)


def is_full(error: Exception) -> bool:
    """Whether a disk, a quota or a limit on the size of files is what stopped writing."""
    if isinstance(error, OSError) and error.errno in FULL:
        return True
    told = str(error)  # safetensors and numpy have errors of their own
    return any(os.strerror(number) in told for number in FULL) or NUMPY_FULL.fullmatch(told) is not None


def files_under(folder: Path, enters: Callable[[Path], bool] = lambda _: True) -> Iterator[str]:
    """Yield the name of every file under a folder, in order; links are followed, every folder is entered once.

    Args:
        folder: that is there.
        enters: whether to look into a folder inside, by its path.

    Raises:
        OSError: a folder cannot be read.
    """
    seen: set[tuple[int, int]] = set()

    def below(place: Path, prefix: str) -> Iterator[str]:
        found = place.stat()
        if (found.st_dev, found.st_ino) in seen:
            return
        seen.add((found.st_dev, found.st_ino))
        for name in sorted(os.listdir(place)):
            if os.path.isdir(place / name):
                if enters(place / name):
                    yield from below(place / name, f"{prefix}{name}/")
            elif os.path.isfile(place / name):
                yield prefix + name

    return below(folder, "")


def new_mode(folder: bool = False) -> int:
    """Return the permissions that the user gives to new files, or folders.

    The mask they are cut by can only be read by setting it, for the whole process; so it is read from the kernel where
    that tells it, and else once, at the first call.
    """
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
        mask = int(status.partition("\nUmask:")[2].split()[0], 8)
    except (OSError, ValueError, IndexError):
        mask = _mask_by_setting()
    return (0o777 if folder else 0o666) & ~mask


@functools.cache
def _mask_by_setting() -> int:
    with _MASK:
        mask = os.umask(0o077)  # what another thread makes meanwhile is rather too private than too public
        os.umask(mask)
        return mask


def descriptor_of(path: Path) -> int | None:
    """Return the number of the open file that a path names: ``/dev/stdout``, ``/dev/fd/3``, or a link to one."""
    current = path.absolute()
    for _ in range(LINKS):
        found = DESCRIPTOR.fullmatch(str(current))
        if found is not None:
            if found["process"] not in (None, "self", str(os.getpid())):
                return None
            return STANDARD[found["name"]] if found["name"] else int(found["number"])
        if not current.is_symlink():
            return None
        current = Path(os.path.normpath(current.parent / os.readlink(current)))
    return None


def is_kept_on_disk(path: Path) -> bool:
    """Whether a file is, or would be, an ordinary one, and not a pipe, a device or a descriptor."""
    return descriptor_of(path) is None and (not path.exists() or path.is_file())


def why_not_written(path: Path) -> str | None:
    """Return why a file that a user names cannot be written, as far as is known before; None if it can be."""
    try:
        if descriptor_of(path) is not None:
            return None
        target = Path(os.path.realpath(path))
        if target.is_dir() or not target.parent.is_dir():
            return "not a file in a folder that is there"
        if (length := len(os.fsencode(target.name))) > LONGEST_NAME - len("..unfinished"):
            return f"a name of {length} bytes; expected {LONGEST_NAME - len('..unfinished')} at most"
        if target.is_block_device() or not os.access(target if target.exists() else target.parent, os.W_OK):
            return "cannot be written"
    except OSError as error:
        return error.strerror or str(error)
    return None


def write_to(path: Path, content: str) -> None:
    """Write where a user says: an ordinary file appears whole, a link stays one, and into all else it is written.

    Args:
        path: of a file, new or there, a link, a pipe, a device such as ``/dev/null``, or an open file.
        content: text, written as UTF-8.

    Raises:
        OSError: it cannot be written, is a folder, or a disk.
    """
    number = descriptor_of(path)
    if number is not None:
        sys.stdout.flush()
        with os.fdopen(os.dup(number), "w", encoding="utf-8") as file:  # its place in the file is shared
            file.write(content)
        return
    if path.is_block_device():
        raise OSError(errno.EINVAL, "a disk, not a file")
    if not is_kept_on_disk(path):
        with path.open("w", encoding="utf-8") as file:
            file.write(content)
        return
    target = Path(os.path.realpath(path))
    if target.is_file() and not os.access(target.parent, os.W_OK):
        target.write_text(content, encoding="utf-8")  # ours to write, in a folder that is not
        return
    write_whole(target, content)
