"""An output must lie apart from what it is made of, by whatever paths and links both are named."""

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from pared.errors import ParedError


def require_apart(out: Path, inputs: Iterable[Path]) -> None:
    """Check that an output neither is, holds nor lies inside of anything that is read.

    Both sides are resolved; files and folders are the same if the system says so, which sees through links, mounts and
    the case of letters.

    Args:
        out: the folder to be made.
        inputs: files and folders that are read; those that are not there are passed over.

    Raises:
        ParedError: it does; says which.
    """
    place = Path(os.path.realpath(out))
    for given in inputs:
        real = Path(os.path.realpath(given.expanduser()))
        if not real.exists():
            continue
        if _same(place, real):
            raise ParedError(f"output {out} is {given}, which is read; name another folder")
        if any(_same(place, above) for above in real.parents) or _holds(place, real):
            raise ParedError(f"output {out} holds {given}, which is read; name another folder")
        if real.is_dir() and any(_same(real, above) for above in place.parents):
            raise ParedError(f"output {out} lies inside {given}, which is read; name a folder outside of it")


def _same(one: Path, other: Path) -> bool:
    try:
        return one.samefile(other)
    except OSError:
        return False


def _holds(place: Path, real: Path) -> bool:
    """Whether something under a folder is an input, or a file in it, under another name: a hard link, a mount."""
    try:
        wanted = {_identity(real), *(_identity(path) for path in (real.iterdir() if real.is_dir() else ()))}
        return any(_identity(path) in wanted for path in _under(place))
    except OSError:
        return False


def _under(folder: Path) -> Iterator[Path]:
    if folder.is_dir():
        for path in folder.iterdir():
            yield path
            if not path.is_symlink():
                yield from _under(path)


def _identity(path: Path) -> tuple[int, int]:
    found = path.stat(follow_symlinks=False)
    return found.st_dev, found.st_ino
