"""An output that is one file appears whole or not at all: it is made in a hidden folder beside its place and moved."""

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from pared.errors import ParedError
from pared.io.files import new_mode, sync
from pared.io.leftovers import STAGING, held, remove
from pared.io.output_dir import (
    require_name,
    require_overwrite,
    require_place,
    require_space,
    telling_of,
    telling_what_is_wrong,
)


def require_free_file(
    out: Path, overwrite: bool, replaceable: Callable[[Path], bool], inputs: Iterable[Path] = ()
) -> None:
    """Check that an output file may be written; what a killed run left beside it is removed first.

    Args:
        out: the file to be made.
        overwrite: whether a file there may be replaced.
        replaceable: whether a file is of the kind that is written, as only such a one is replaced.
        inputs: files and folders that are read to make it.

    Raises:
        ParedError: it is there already and ``overwrite`` was not asked for, or is of another kind; it is a folder or a
            link; it is, or lies inside, what is read; its name is too long; or nothing can be written where it would
            lie.
    """
    with telling_what_is_wrong(out):
        require_name(out)
        require_place(out, "file", inputs)
        if not out.exists():
            return
        require_overwrite(out, "file", overwrite)
        if not replaceable(out):
            raise ParedError(f"output {out} is not replaced, as it is no {out.suffix} file; name another")


@contextmanager
def staged_file(
    out: Path,
    overwrite: bool,
    replaceable: Callable[[Path], bool],
    needed: int = 0,
    inputs: Iterable[Path] = (),
) -> Iterator[Path]:
    """Give a path beside ``out`` to write a file to, and let it take the place of ``out`` if nothing went wrong.

    On any error, and on Ctrl-C, what was written is removed and what was at ``out`` is as it was.

    Args:
        out: the file to be made.
        overwrite: as for :func:`require_free_file`.
        replaceable: as for :func:`require_free_file`.
        needed: bytes the disk must have free.
        inputs: files and folders that are read to make it.

    Raises:
        ParedError: ``out`` is taken, or was taken meanwhile, or the disk is or becomes full.
    """
    inputs = list(inputs)
    require_free_file(out, overwrite, replaceable, inputs)
    require_space(out, needed)
    with telling_of(out, "file"):
        out.parent.mkdir(parents=True, exist_ok=True)
        with held(out, STAGING) as staging:
            try:
                file = staging / out.name
                yield file
                file.chmod(new_mode())
                sync(file)
                require_free_file(out, overwrite, replaceable, inputs)  # another job may have been faster
                os.replace(file, out)
                sync(out.parent)
            finally:
                remove(staging)
