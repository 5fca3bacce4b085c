"""Journals: a JSON value a line, each on the disk before the next is begun, each with a checksum.

The checksum goes over the line and the checksum of the line before, so that a digit that flips and a line that is lost
or moved are found. A last line that is torn, as a crash or a power cut leaves it, is dropped: what it told is
measured again. Lines of before there were checksums are read as they are.
"""

import hashlib
import json
import logging
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

from pared.errors import ParedError
from pared.io.guarded import parse_json

log = logging.getLogger(__name__)

LINE = re.compile(rb'(?P<text>\{.+), "check": "(?P<check>[0-9a-f]{16})"\}', flags=re.DOTALL)


def sealed(fields: Mapping[str, Any], before: str = "") -> tuple[bytes, str]:
    """Return the line of an object, with its newline, and the checksum in it.

    Args:
        fields: at least one, none of them called ``check``.
        before: the checksum of the line before, where the order of lines counts.
    """
    text = json.dumps(fields).encode()[:-1]
    check = _check(text, before)
    return text + f', "check": "{check}"}}\n'.encode(), check


def opened(line: bytes, before: str = "") -> tuple[dict[str, Any], str] | None:
    """Return the object of a line and its checksum (empty where it has none); None where the line is damaged."""
    found = LINE.fullmatch(line)
    if found is not None:
        text, check = found["text"], found["check"].decode()
        if _check(text, before) != check:
            return None
        line = text + b"}"
    elif before:
        return None  # lines with checksums are not followed by one without
    else:
        check = ""
    try:
        fields = parse_json(line, "line", unique=False)
    except ParedError:
        return None
    return (fields, check) if isinstance(fields, dict) else None


class Lines:
    """The lines of a file that is open for reading and appending, checked; new ones go behind them.

    Attributes:
        found: what the lines held when the file was opened, in order.
    """

    def __init__(self, file: BinaryIO, path: Path, what: str, of: str, begins: str) -> None:
        """Read all lines, and cut off a last one that is torn.

        Args:
            file: open for reading and appending.
            path: of it, for messages.
            what: it is, for messages: ``journal``.
            of: what it is one, for messages: ``a search``.
            begins: the first key of the first line, which tells such a file from every other.

        Raises:
            ParedError: a line is damaged, or it is another file; names it and the line.
        """
        self._file, self._check = file, ""
        self.found: list[dict[str, Any]] = []
        file.seek(0)
        content = file.read()
        *lines, torn = content.split(b"\n")
        start = json.dumps({begins: 0}).encode()[: len(begins) + 4]
        if content and not content.startswith(start[: len(content)]):
            raise ParedError(f"{what} {path}, line 1: the first line is not that of {of}, which begins with "
                             f"{begins!r}; it is another file, or damaged")  # fmt: skip
        kept = 0
        for number, line in enumerate(lines, 1):
            one = opened(line, self._check)
            if one is None:
                raise ParedError(f"{what} {path}, line {number}: not a line of {of}, or its checksum is wrong; the "
                                 "file is damaged: restore it, or remove it to begin anew")  # fmt: skip
            fields, self._check = one
            self.found.append(fields)
            kept += len(line) + 1
        if torn:
            log.warning("%s %s: line %d is torn; it was dropped and is measured again", what, path, len(self.found) + 1)
            file.truncate(kept)
        file.seek(0, os.SEEK_END)

    def put(self, fields: Mapping[str, Any]) -> None:
        """Write a line, and have it on the disk."""
        line, self._check = sealed(fields, self._check)
        self._file.write(line)
        self._file.flush()
        os.fsync(self._file.fileno())


def _check(text: bytes, before: str) -> str:
    return hashlib.sha256(before.encode() + b"\n" + text).hexdigest()[:16]
