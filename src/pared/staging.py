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
MODEL_FILES = ("pared.json", "config.json")  # only a folder that holds one of these is ever replaced


def require_free(out: Path, overwrite: bool) -> None:
    """Check that an output folder may be written.

    Raises:
        ParedError: it is there already and ``overwrite`` was not asked for, it is no model folder, it is a file or a
            link, or nothing can be written where it would lie.
    """
    try:
        _require_free(out, overwrite)
    except OSError as error:
        raise ParedError(f"output {out}: {error.strerror or error}") from None


def _require_free(out: Path, overwrite: bool) -> None:
    whole = out.absolute()
    if whole in (Path.cwd(), *Path.cwd().parents, Path.home()):
        raise ParedError(f"output {out} is a folder you work in; name a new one inside it")
    place = next(folder for folder in whole.parents if folder.exists())
    if not (place.is_dir() and os.access(place, os.W_OK)):
        raise ParedError(f"output {out}: {place} is not a folder that can be written to; name another place")
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise ParedError(f"output {out} is a {'link' if out.is_symlink() else 'file'}; name a folder")
    if not out.is_dir() or not any(out.iterdir()):
        return
    if not overwrite:
        raise ParedError(f"output folder {out} is there already; name another or pass --overwrite")
    if not any((out / name).exists() for name in MODEL_FILES):
        raise ParedError(f"output folder {out} holds something that is not a model; it is not replaced: name another")


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

    On any error, and on Ctrl-C, the staging folder is removed and what was at ``out`` is as it was. What a killed
    process left is removed by the next one that stages the same folder.

    Args:
        out: the folder to be made.
        overwrite: whether a model folder there may be replaced.
        needed: bytes the disk must have free.

    Raises:
        ParedError: ``out`` is taken, or was taken meanwhile, or the disk is or becomes full.
    """
    require_free(out, overwrite)
    require_space(out, needed)
    staging = None
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        _sweep(out)
        staging = _beside(out)
        staging.chmod(0o755)
        yield staging
        for file in staging.rglob("*"):  # safetensors writes files that only their owner can read
            file.chmod(0o755 if file.is_dir() else 0o644)
        require_free(out, overwrite)  # another job may have been faster
        _swap(staging, out)
    except (OSError, SafetensorError) as error:
        if getattr(error, "errno", None) == errno.ENOSPC or os.strerror(errno.ENOSPC) in str(error):
            raise ParedError(f"the disk filled up while writing {out}; the partial folder was removed") from None
        raise ParedError(f"writing {out} failed ({error}); the partial folder was removed") from error
    finally:
        if staging is not None:
            shutil.rmtree(staging, ignore_errors=True)


def _beside(out: Path) -> Path:
    """Make an empty folder beside ``out``, named after it and this process."""
    return Path(tempfile.mkdtemp(prefix=f".{out.name}.staging-{os.getpid()}-", dir=out.parent))


def _sweep(out: Path) -> None:
    """Remove the staging folders of ``out`` whose process is gone, but for those that hold a replaced folder."""
    prefix = f".{out.name}.staging-"
    for path in out.parent.glob(f"{prefix}*"):
        pid = path.name.removeprefix(prefix).partition("-")[0]
        if pid.isdigit() and not _alive(int(pid)) and not (path / out.name).exists():
            shutil.rmtree(path, ignore_errors=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def _swap(staging: Path, out: Path) -> None:
    if not out.exists():
        staging.rename(out)
        return
    old = _beside(out)
    try:
        out.rename(old / out.name)
        staging.rename(out)
    except BaseException:  # Ctrl-C too: what is in `old` is about to be removed
        if not out.exists():
            (old / out.name).rename(out)
        raise
    finally:
        shutil.rmtree(old, ignore_errors=True)
