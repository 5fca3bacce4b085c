"""An output folder appears whole or not at all: it is made beside its place and changes places with what is there."""

import logging
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from pared.errors import ParedError
from pared.io.apart import require_apart, require_holds_none, same
from pared.io.files import is_full, new_mode, path_of, sync
from pared.io.guarded import brief
from pared.io.leftovers import REPLACED, ROOM, STAGING, held, remove, tidy
from pared.io.lock import locked_folder
from pared.io.record import foreign
from pared.io.swap import exchange
from pared.names import called

log = logging.getLogger(__name__)

RESERVE = 32 * 1024 * 1024  # bytes for tokenizer, manifest and card
LONGEST_NAME, LONGEST_PATH, INSIDE = 255, 4096, 200  # bytes; the last for what lies in the folder


def require_free(out: Path, overwrite: bool, inputs: Iterable[Path] = (), ours: bool = False) -> None:
    """Check that an output folder may be written; what a killed run left beside it is put back or removed first.

    Args:
        out: the folder to be made.
        overwrite: whether a folder that pared wrote may be replaced.
        inputs: files and folders that are read to make it.
        ours: whether the folder lies where only pared works, so that what is in it needs no proof.

    Raises:
        ParedError: it is there already and ``overwrite`` was not asked for; something in it was not written by pared;
            it is, holds or lies inside what is read; it is a file, a link or a mount; its name is too long; or nothing
            can be written where it would lie.
    """
    with telling_what_is_wrong(out):
        whole = out.absolute()
        require_name(out)
        if any(same(whole, used) for used in (Path.cwd(), *Path.cwd().parents, path_of("~"))):
            raise ParedError(f"output {out} is a folder you work in; name a new one inside it")
        require_place(out, "folder", inputs)
        if out.is_dir() and os.path.ismount(out):
            raise ParedError(f"output {out} is a mount, which cannot be replaced; name a folder inside it")
        if not out.is_dir() or not any(out.iterdir()):
            return
        require_overwrite(out, "folder", overwrite)
        require_holds_none(out, inputs)
        if not ours and (found := foreign(out)) is not None:
            raise ParedError(f"output folder {out} is not replaced, as not all in it is pared's: {found}; name "
                             "another, or move away what is yours")  # fmt: skip


@contextmanager
def telling_what_is_wrong(out: Path) -> Iterator[None]:
    """Report what the system says while an output, a folder or a file, is looked at.

    Raises:
        ParedError: the system refused to tell.
    """
    try:
        yield
    except OSError as error:
        where = f" ({error.filename})" if error.filename not in (None, str(out)) else ""
        raise ParedError(f"output {out}: {error.strerror or error}{where}") from None


def require_name(out: Path) -> None:
    """Refuse a name that no output can have.

    Raises:
        ParedError: it holds a zero byte, or is too long.
    """
    if "\0" in str(out):
        raise ParedError(f"output {brief(str(out))}: no name of a file or folder holds a zero byte; name another")
    require_short(out)


def require_place(out: Path, kind: str, inputs: Iterable[Path]) -> None:
    """Check where an output will lie; what a killed run left beside it is put back or removed.

    Args:
        out: to be made.
        kind: ``folder`` or ``file``.
        inputs: files and folders that are read to make it.

    Raises:
        ParedError: nothing can be written there, it is or lies inside what is read, or something of another kind is
            there.
    """
    place = next(folder for folder in out.absolute().parents if folder.exists())
    if not (place.is_dir() and os.access(place, os.W_OK)):
        raise ParedError(f"output {out}: {place} is not a folder that can be written to; name another place")
    require_apart(out, inputs)
    tidy(out)
    is_kind, other = (out.is_dir(), "file") if kind == "folder" else (out.is_file(), "folder")
    if out.is_symlink() or (out.exists() and not is_kind):
        raise ParedError(f"output {out} is a {'link' if out.is_symlink() else other}; name a {kind}")


def require_overwrite(out: Path, kind: str, overwrite: bool) -> None:
    """Refuse to replace an output that is there, a ``folder`` or a ``file``, unless that was asked for.

    Raises:
        ParedError: it was not.
    """
    if not overwrite:
        raise ParedError(f"output {kind} {out} is there already; name another or pass {called('overwrite', 'True')}")


def require_short(out: Path) -> None:
    """Refuse a name beside which a hidden, longer one would not fit.

    Raises:
        ParedError: the name or the whole path is too long; says how long it may be.
    """
    whole = out.absolute()
    place = next((folder for folder in whole.parents if folder.is_dir()), Path(whole.anchor))
    try:
        longest = os.pathconf(place, "PC_NAME_MAX")
    except (AttributeError, OSError, ValueError):
        longest = LONGEST_NAME
    for name in whole.parts[len(place.parts) :]:
        if (length := len(os.fsencode(name))) > longest - ROOM:
            raise ParedError(f"output {name[:40]}…: a name of {length} bytes; expected {longest - ROOM} at most, as "
                             "hidden folders beside it have longer ones")  # fmt: skip
    if (length := len(os.fsencode(whole))) > LONGEST_PATH - INSIDE - ROOM:
        raise ParedError(f"output …{str(out)[-40:]}: a path of {length:,} bytes; expected "
                         f"{LONGEST_PATH - INSIDE - ROOM:,} at most")  # fmt: skip


def require_space(out: Path, needed: int) -> None:
    """Check that the disk that ``out`` will lie on has room for ``needed`` bytes and a little more.

    Raises:
        ParedError: it has not; says how much there is.
    """
    free = free_space(out)
    if free < needed + RESERVE:
        raise ParedError(
            f"not enough disk for {out}: {needed + RESERVE:,} bytes needed, {free:,} free; nothing was written"
        )


def free_space(out: Path) -> int:
    """Return the bytes that are free on the disk that a folder lies on, or will."""
    existing = next(folder for folder in (out, *out.absolute().parents) if folder.exists())
    return shutil.disk_usage(existing).free


@contextmanager
def staged(
    out: Path, overwrite: bool = False, needed: int = 0, inputs: Iterable[Path] = (), ours: bool = False
) -> Iterator[Path]:
    """Give a folder beside ``out`` to write to, and let it take the place of ``out`` if nothing went wrong.

    On any error, and on Ctrl-C, the staging folder is removed and what was at ``out`` is as it was. Where the system
    can exchange two folders in one step there is a whole folder at ``out`` at any time; elsewhere a process killed
    between two renames leaves none there, and the next one that names it puts the old one back. It also removes what
    killed processes left, and says so.

    Args:
        out: the folder to be made.
        overwrite: whether a folder there that pared wrote may be replaced.
        needed: bytes the disk must have free.
        inputs: files and folders that are read to make it.
        ours: whether the folder lies where only pared works.

    Raises:
        ParedError: ``out`` is taken, or was taken meanwhile, or the disk is or becomes full.
    """
    inputs = list(inputs)
    require_free(out, overwrite, inputs, ours)
    require_space(out, needed)
    with telling_of(out, "folder"):
        out.parent.mkdir(parents=True, exist_ok=True)
        with held(out, STAGING) as staging:
            try:
                staging.chmod(new_mode(folder=True))
                yield staging
                _finish(staging)
                require_free(out, overwrite, inputs, ours)  # another job may have been faster
                _swap(staging, out, ours)
            finally:
                if staging.exists():
                    remove(staging)


@contextmanager
def telling_of(out: Path, kind: str) -> Iterator[None]:
    """Report what stops the writing of an output, of which the part that was written is removed.

    Args:
        out: the output.
        kind: ``folder`` or ``file``.

    Raises:
        ParedError: it cannot be written, or the disk is full.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        if is_full(error):
            raise ParedError(f"the disk filled up while writing {out}; the partial {kind} was removed") from None
        raise ParedError(f"writing {out} failed ({error}); the partial {kind} was removed") from error


def _finish(folder: Path) -> None:
    """Give what was written the permissions of new files, and have it on the disk before anything else goes."""
    for path in (*folder.rglob("*"), folder):
        path.chmod(new_mode(path.is_dir()))  # safetensors writes files that only their owner can read
        sync(path)


def _swap(staging: Path, out: Path, ours: bool) -> None:
    if not out.exists():
        staging.rename(out)
    elif exchange(staging, out):
        if not ours and any(staging.iterdir()) and (found := foreign(staging, thorough=False)) is not None:
            exchange(staging, out)  # came while the new one was written
            raise ParedError(f"output folder {out} is not replaced, as not all in it is pared's: {found}")
    else:
        _swap_in_two(staging, out)


def _swap_in_two(staging: Path, out: Path) -> None:
    """Move the old folder aside and the new one to its place; a process killed between leaves the old one aside."""
    with (
        held(out, REPLACED) as old,
        locked_folder(out, wait=True),
    ):  # the lock moves with the folder: it is not taken for lost
        try:
            out.rename(old)
            staging.rename(out)
        except BaseException:  # Ctrl-C too
            if not out.exists():
                old.rename(out)
            raise
        finally:
            if old.exists():
                remove(old)
