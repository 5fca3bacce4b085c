"""An output folder appears whole or not at all: it is made beside its place and renamed."""

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from pared.errors import ParedError

RESERVE = 32 * 1024 * 1024  # bytes for tokenizer, manifest and card


def require_free(out: Path, overwrite: bool) -> None:
    """Check that an output folder may be written.

    Raises:
        ParedError: it is there already and ``overwrite`` was not asked for, it is a file, or nothing can be written
            where it would lie.
    """
    place = next(folder for folder in out.absolute().parents if folder.exists())
    if not (place.is_dir() and os.access(place, os.W_OK)):
        raise ParedError(f"output {out}: {place} is not a folder that can be written to; name another place")
    if out.exists() and not out.is_dir():
        raise ParedError(f"output {out} is a file; name a folder")
    if out.is_dir() and any(out.iterdir()) and not overwrite:
        raise ParedError(f"output folder {out} is there already; name another or pass --overwrite")


def require_space(out: Path, needed: int) -> None:
    """Check that the disk that ``out`` will lie on has room for ``needed`` bytes and a little more.

    Raises:
        ParedError: it has not; says how much there is.
    """
    existing = next(folder for folder in (out, *out.absolute().parents) if folder.exists())
    free = shutil.disk_usage(existing).free
    if free < needed + RESERVE:
        raise ParedError(
            f"not enough disk for {out}: {needed + RESERVE:,} bytes needed, {free:,} free; nothing was written"
        )


@contextmanager
def staged(out: Path, overwrite: bool = False, needed: int = 0) -> Iterator[Path]:
    """Give a folder beside ``out`` to write to, and rename it to ``out`` if nothing went wrong.

    On any error, and on Ctrl-C, the staging folder is removed and what was at ``out`` is as it was.

    Args:
        out: the folder to be made.
        overwrite: whether a folder there may be replaced.
        needed: bytes the disk must have free.

    Raises:
        ParedError: ``out`` is taken, or the disk is or becomes full.
    """
    require_free(out, overwrite)
    require_space(out, needed)
    out.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{out.name}.staging-", dir=out.parent))
    try:
        staging.chmod(0o755)
        yield staging
        _swap(staging, out)
    except (OSError, SafetensorError) as error:
        if getattr(error, "errno", None) == errno.ENOSPC or os.strerror(errno.ENOSPC) in str(error):
            raise ParedError(f"the disk filled up while writing {out}; the partial folder was removed") from None
        raise ParedError(f"writing {out} failed ({error}); the partial folder was removed") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _swap(staging: Path, out: Path) -> None:
    if not out.exists():
        staging.rename(out)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{out.name}.replaced-", dir=out.parent))
    try:
        out.rename(old / out.name)
        staging.rename(out)
    except BaseException:  # Ctrl-C too: what is in `old` is about to be removed
        if not out.exists():
            (old / out.name).rename(out)
        raise
    finally:
        shutil.rmtree(old, ignore_errors=True)
