"""Files of text and of JSON rows, gzipped or not."""

import gzip
import json
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pared.errors import ParedError


def data_folder() -> Path | None:
    """Return the folder of well-known data that ``PARED_DATA`` names; None if they are read from the Hub."""
    named = os.environ.get("PARED_DATA")
    return Path(named) if named else None


def data_file(file: str, what: str, instead: str | None = None) -> Path:
    """Return a file of the folder that ``PARED_DATA`` names, or the same one gzipped.

    Args:
        file: under it.
        what: is read from it, for messages.
        instead: what a user who has not got the file can do, for messages; None where the Hub has it.

    Raises:
        ParedError: it names none, or that has no such file.
    """
    root = data_folder()
    if root is None:
        otherwise = f", or {instead}" if instead else ""
        raise ParedError(f"{what} is read from the folder that PARED_DATA names, and it names none; set it "
                         f"(docs/evaluation.md tells what lies there){otherwise}")  # fmt: skip
    path = root / file
    for found in (path, path.with_name(f"{path.name}.gz")):
        if found.is_file():
            return found
    there = ", ".join(sorted(beside.name for beside in path.parent.glob("*"))) or "nothing"
    raise ParedError(f"{what}: PARED_DATA names {root}, which has no {file}; found beside it: {there}; put it "
                     f"there, or {instead or 'unset PARED_DATA to read it from the Hub'}")  # fmt: skip


def read_text(path: Path, what: str = "file") -> str:
    """Read a UTF-8 file, gzipped if its name ends so.

    Args:
        path: of the file.
        what: it is, for messages.

    Raises:
        ParedError: missing, not UTF-8 or a damaged archive; names the file.
    """
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        return raw.decode("utf-8-sig")
    except (UnicodeDecodeError, EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ParedError(f"{what} {path}: not readable ({error})") from None
    except OSError as error:
        raise ParedError(f"{what} {path}: {error.strerror or error}") from None


def read_lines(path: Path, what: str = "file") -> list[str]:
    """Read the lines of a file; not those of ``splitlines``, as texts hold U+2028, U+0085 and others it splits at."""
    return [line.removesuffix("\r") for line in read_text(path, what).split("\n")]


def read_rows(path: Path, what: str = "file") -> Iterator[tuple[int, Any]]:
    """Read a file of one JSON value a line, with the number of each, from 1; blank lines are left out.

    Raises:
        ParedError: as :func:`read_text`, or a row is not JSON; names the file and the row.
    """
    for number, line in enumerate(read_lines(path, what), 1):
        if line.strip():
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ParedError(f"{path}, row {number}: not JSON ({error})") from None
            yield number, row
