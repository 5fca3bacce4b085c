"""Files of text and of JSON rows, gzipped or not."""

import codecs
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pared.errors import ParedError, UnreachableError
from pared.io.guarded import parse_json, read_bytes, unzipped

GZIP = b"\x1f\x8b"  # the first bytes of every archive
BYTE_ORDER_MARKS = {
    codecs.BOM_UTF32_LE: "UTF-32",  # before UTF-16, whose mark it begins with
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}
SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


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
        ParedError: it names none, or that has no such file; an :class:`UnreachableError` where the Hub has it.
    """
    root = data_folder()
    if root is None:
        otherwise = f", or {instead}" if instead else ""
        raise ParedError(f"{what} is read from the folder that PARED_DATA names, and it names none; set it "
                         f"(docs/evaluation.md says what belongs there){otherwise}")  # fmt: skip
    path = root / file
    for found in (path, path.with_name(f"{path.name}.gz")):
        if found.is_file():
            return found
    there = ", ".join(sorted(beside.name for beside in path.parent.glob("*"))) or "nothing"
    kind = ParedError if instead else UnreachableError
    raise kind(f"{what}: PARED_DATA names {root}, which has no {file}; that folder holds {there}; put it "
                     f"there, or {instead or 'unset PARED_DATA to read it from the Hub'}")  # fmt: skip


def require_there(path: Path, what: str) -> None:
    """Check that a regular file is there, without reading it.

    Args:
        path: of the file.
        what: it is, for messages.

    Raises:
        ParedError: it is not there, or no regular file.
    """
    if not os.path.isfile(path):
        there = "not a regular file" if os.path.exists(path) else "No such file or directory"
        raise ParedError(f"{what} {path}: {'Is a directory' if os.path.isdir(path) else there}")


def read_text(path: Path, what: str = "file") -> str:
    """Read a UTF-8 file, gzipped if its name ends so.

    Args:
        path: of the file.
        what: it is, for messages.

    Raises:
        ParedError: missing, not UTF-8 or a damaged archive; names the file.
    """
    try:
        raw = read_bytes(path, what)
        zipped = path.suffix == ".gz"
        if not zipped and raw.startswith(GZIP):
            raise ParedError(f"{what} {path}: is gzipped; call it {path.name}.gz")
        raw = unzipped(raw, f"{what} {path}") if zipped else raw
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ParedError(f"{what} {path}: is not UTF-8 ({_instead(raw) or error})") from None
    if "\0" in text:
        raise ParedError(f"{what} {path}: holds zero bytes; expected UTF-8 text, and this is a binary file or UTF-16")
    return text


def _instead(raw: bytes) -> str:
    """Say what bytes that are not UTF-8 seem to be, nothing if that cannot be told."""
    for mark, name in BYTE_ORDER_MARKS.items():
        if raw.startswith(mark):
            return f"it begins as {name}: iconv -f {name} -t UTF-8 converts it"
    return "it holds zero bytes, as binary files do" if b"\0" in raw[:4096] else ""


def read_lines(path: Path, what: str = "file") -> list[str]:
    """Read the lines of a file; not those of ``splitlines``, as texts hold U+2028, U+0085 and others it splits at."""
    return [line.removesuffix("\r") for line in read_text(path, what).split("\n")]


def read_rows(path: Path, what: str = "file") -> Iterator[tuple[int, Any]]:
    """Read a file of one JSON value a line, with the number of each, from 1; blank lines are left out.

    Raises:
        ParedError: as :func:`read_text`, a row is not JSON, or one holds half of a surrogate pair, which is no
            character; names the file and the row.
    """
    for number, line in enumerate(read_lines(path, what), 1):
        if line.strip():
            row = parse_json(line, f"{path}, row {number}", unique=False)
            if SURROGATE.search(line):
                require_characters(f"{path}, row {number}", row)
            yield number, row


def require_characters(which: str, value: object) -> None:
    """Refuse strings that hold half of a surrogate pair: no encoding has it, and so no tokenizer.

    Args:
        which: value it is, for messages.
        value: a string, or what JSON can hold.

    Raises:
        ParedError: one does; names the value and shows the place.
    """
    found = _half(value)
    if found is not None:
        text, at = found
        shown = text[max(0, at - 20) : at + 20].encode("utf-8", "backslashreplace").decode()
        raise ParedError(
            f"{which}: half of a surrogate pair, \\u{ord(text[at]):04x}, in {shown!r}, which is not a character: "
            "fix the row, or leave it out"
        )


def _half(value: object) -> tuple[str, int] | None:
    """Return the first string with half of a pair, and where."""
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            return value, error.start
        return None
    inside = [*value, *value.values()] if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return next((found for one in inside if (found := _half(one)) is not None), None)
