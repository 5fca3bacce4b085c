"""An output must lie apart from what it is made of, by whatever paths and links both are named."""

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from pared.errors import ParedError
from pared.io.files import path_of


def require_apart(out: Path, inputs: Iterable[Path]) -> None:
    """Check that an output neither is, holds nor lies inside of anything that is read, by their paths.

    Both sides are resolved; files and folders are the same if the system says so, which sees through links, mounts and
    the case of letters.

    Args:
        out: the folder to be made.
        inputs: files and folders that are read; those that are not there are passed over.

    Raises:
        ParedError: it does; says which.
    """
    place = Path(os.path.realpath(out))
    for given, real in _there(inputs):
        if same(place, real):
            raise ParedError(f"output {out} is {given}, which is read; name another folder")
        if any(same(place, above) for above in real.parents):
            raise ParedError(f"output {out} holds {given}, which is read; name another folder")
        if real.is_dir() and any(same(real, above) for above in place.parents):
            raise ParedError(f"output {out} lies inside {given}, which is read; name a folder outside of it")


def require_holds_none(out: Path, inputs: Iterable[Path]) -> None:
    """Check that nothing in a folder that is to be replaced is read under another name: a hard link, a mount.

    Args:
        out: a folder that is there.
        inputs: files and folders that are read; those that are not there are passed over.

    Raises:
        ParedError: something is; says which.
        OSError: a folder or file in it, or an input, cannot be looked at.
    """
    wanted: dict[tuple[int, int], Path] = {}
    for given, real in _there(inputs):
        for path in (real, *(real.iterdir() if real.is_dir() else ())):
            wanted.setdefault(_identity(path), given)
    if not wanted:
        return
    for path in _under(out):
        if (found := wanted.get(_identity(path))) is not None:
            raise ParedError(f"output {out} holds {found}, which is read, as {path.relative_to(out)}; name another "
                             "folder")  # fmt: skip


def _there(inputs: Iterable[Path]) -> Iterator[tuple[Path, Path]]:
    """Yield the inputs that are there, with their real paths."""
    for given in inputs:
        path = path_of(given)
        if os.path.exists(path):
            yield given, Path(os.path.realpath(path))


def same(one: Path, other: Path) -> bool:
    """Whether two paths lead to one file or folder; no if either leads nowhere."""
    try:
        return one.samefile(other)
    except OSError:
        return False


def _under(folder: Path) -> Iterator[Path]:
    for path in folder.iterdir():
        yield path
        if path.is_dir() and not path.is_symlink():
            yield from _under(path)


def _identity(path: Path) -> tuple[int, int]:
    found = path.stat(follow_symlinks=False)
    return found.st_dev, found.st_ino
