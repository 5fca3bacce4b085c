"""Journals: a JSON object a line, each on the disk before the next is begun, each with a checksum.

The checksum goes over the line and the checksum of the line before, so that a digit that flips and a line that is lost
or moved are found. A last line that is torn, as a crash or a power cut leaves it, is dropped: what it told is done
again. Lines of before there were checksums are read as they are.
"""

import hashlib
import json
import logging
import os
import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from pared.errors import ParedError
from pared.io.files import is_full, sync, write_whole
from pared.io.fingerprint import as_json, require_same
from pared.io.guarded import parse_json, read_bytes
from pared.io.lock import opened_alone

log = logging.getLogger(__name__)

LINE = re.compile(rb'(?P<text>\{.+), "check": "(?P<check>[0-9a-f]{16})"\}', flags=re.DOTALL)


class Journal:
    """The journal of one run: what it has found so far, open for more; a context manager.

    The first line is the header, which tells what sort of journal it is and of which run. It is written with the first
    entry, or by :meth:`begin`; a file without any line is removed when it is closed. No two journals are open on one
    file at a time.

    Attributes:
        path: of the file.
        entries: what its lines hold, but for the header, in order.
    """

    def __init__(
        self,
        path: Path,
        header: Mapping[str, Any],
        what: str = "journal",
        of: str = "a run",
        busy: str | None = None,
        advice: str = "resume it with the same settings, or remove the file to start over",
        headed: bool = True,
    ) -> None:
        """Open a journal, or begin one; a last line that is torn is cut off.

        Args:
            path: of the file; its folder is there.
            header: one key that tells such journals from other files, with the version of the format, then everything
                that the run depends on.
            what: the file is, for messages.
            of: what it is one, for messages: ``a search``.
            busy: the message where another process has it open.
            advice: what to do with the journal of another run, for the message.
            headed: whether the header is written; without one, its first key is that of every line.

        Raises:
            ParedError: it is open elsewhere, of another run, another file, damaged, or cannot be read or written; names
                the file and the line.
        """
        self.path, self.entries, self._header, self._headed = path, list[dict[str, Any]](), as_json(header), headed
        self._what, self._of, self._advice = what, of, advice
        self._busy = busy or f"{what} {path}: another process is writing it; wait for it, or name another"
        self._check, self._size = "", 0
        self._file: BinaryIO | None = None
        self._open()

    def __enter__(self) -> "Journal":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def begin(self) -> None:
        """Write the header now, so that the file is this run's though nothing is found yet.

        Raises:
            ParedError: it could not be written.
        """
        if self._headed and not self._size:
            self._write([self._header])

    def append(self, fields: Mapping[str, Any]) -> None:
        """Add a line, and have it on the disk.

        Args:
            fields: at least one, none of them called ``check``; what JSON can hold.

        Raises:
            ParedError: it could not be written; the journal is as it was.
        """
        self._write([fields] if self._size or not self._headed else [self._header, fields])
        self.entries.append(as_json(fields))

    def replace(self, entries: Iterable[Mapping[str, Any]]) -> None:
        """Have these lines in place of all, at once: who reads finds the old ones or the new.

        Raises:
            ParedError: they cannot be written; the journal is as it was.
        """
        assert self._headed
        try:
            self.write(self.path, self._header, entries)
        except OSError as error:
            raise ParedError(f"{self._what} {self.path}: {_why(error)}; it holds what it held before") from None
        self._close_file()
        self._open()

    @staticmethod
    def write(path: Path, header: Mapping[str, Any], entries: Iterable[Mapping[str, Any]]) -> None:
        """Write a journal at once; without entries it is empty.

        Raises:
            OSError: it cannot be written; what was there is as it was.
        """
        entries = list(entries)
        write_whole(path, _sealed_lines([header, *entries])[0] if entries else b"")

    @staticmethod
    def remove(path: Path, what: str, busy: str, beside: Iterable[Path] = ()) -> None:
        """Remove a journal, whatever run it is of, and say so.

        Args:
            path: of the file; nothing happens without one.
            what: the file is, for messages.
            busy: the message where another process has it open.
            beside: files that go with it.

        Raises:
            ParedError: another process has it open, or it cannot be removed.
        """
        if not path.exists():
            return
        with opened_alone(path, what, busy):
            try:
                for file in (*beside, path):
                    file.unlink(missing_ok=True)
            except OSError as error:
                raise ParedError(f"{what} {path}: {_why(error)}") from None
        log.warning("%s %s, of a run before, was removed: this one starts over", what, path)

    def close(self) -> None:
        """Let others have the file; one that holds nothing is removed."""
        if self._file is not None:
            if not self._size:
                self.path.unlink(missing_ok=True)
            self._close_file()

    def _write(self, lines: Iterable[Mapping[str, Any]]) -> None:
        assert self._file is not None, f"{self.path} is closed"
        number = self._file.fileno()
        content, check = _sealed_lines(lines, self._check)
        try:
            if os.fstat(number).st_size != self._size:  # what an interrupt cut short
                os.ftruncate(number, self._size)
            left = memoryview(content)
            while left:  # not through the file's buffer, which would try again what failed
                left = left[os.write(number, left) :]
            os.fsync(number)
            if not self._size:
                sync(self.path.parent)
        except OSError as error:
            with suppress(OSError):
                os.ftruncate(number, self._size)
            raise ParedError(f"{self._what} {self.path}: {_why(error)}; it holds what it held before") from None
        self._check, self._size = check, self._size + len(content)

    def _open(self) -> None:
        self._file = opened_alone(self.path, self._what, self._busy)
        try:
            self._file.seek(0)
            lines, self._check, self._size = _read(
                self._file.read(), self.path, self._what, self._of, next(iter(self._header))
            )
            if os.fstat(self._file.fileno()).st_size != self._size:
                number = len(lines) + 1
                log.warning("%s %s: line %d is torn; it was dropped and is done again", self._what, self.path, number)
                self._file.truncate(self._size)
            self._file.seek(0, os.SEEK_END)
            self.entries = self._without_header(lines)
        except OSError as error:
            self._close_file()
            raise ParedError(f"{self._what} {self.path}: {_why(error)}") from None
        except BaseException:
            self._close_file()
            raise

    def _without_header(self, lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
        if not self._headed or not lines:
            return lines
        (mark, _), *_others = self._header.items()
        found = lines[0]
        if found.keys() == {mark, "settings"} and isinstance(found["settings"], dict):  # as pared eval once wrote it
            found = {mark: found[mark], **found["settings"]}
        require_same(found, self._header, f"{self._what} {self.path} is of {self._of} of other settings", self._advice)
        return lines[1:]

    def _close_file(self) -> None:
        if self._file is not None:
            self._file.close()
        self._file = None


def read_entries(path: Path, mark: str, what: str = "journal", of: str = "a run") -> list[dict[str, Any]]:
    """Return what the lines of a journal hold, but for the header, while another process has it open.

    Args:
        path: of the file; one that is not there holds nothing.
        mark: the first key of the header.
        what: it is, for messages.
        of: what it is one, for messages.

    Raises:
        ParedError: it is another file or damaged; names the line.
    """
    return _read(read_bytes(path, what), path, what, of, mark)[0][1:] if path.exists() else []


def sealed(fields: Mapping[str, Any], before: str = "") -> tuple[bytes, str]:
    """Return the line of an object, with its newline, and the checksum in it.

    Args:
        fields: at least one, none of them called ``check``.
        before: the checksum of the line before.
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


def _read(content: bytes, path: Path, what: str, of: str, mark: str) -> tuple[list[dict[str, Any]], str, int]:
    """Return the lines of a journal, the checksum of the last, and the bytes that whole lines take up."""
    *lines, _torn = content.split(b"\n")
    start = json.dumps({mark: 0}).encode()[: len(mark) + 4]
    if content and not content.startswith(start[: len(content)]):
        raise ParedError(f"{what} {path}, line 1: the first line is not that of {of}, which begins with {mark!r}; it "
                         "is another file, or damaged")  # fmt: skip
    found: list[dict[str, Any]] = []
    check, size = "", 0
    for number, line in enumerate(lines, 1):
        one = opened(line, check)
        if one is None:
            raise ParedError(f"{what} {path}, line {number}: not a line of {of}, or its checksum is wrong; the file is "
                             "damaged: restore it, or remove it to start over")  # fmt: skip
        fields, check = one
        found.append(fields)
        size += len(line) + 1
    return found, check, size


def _sealed_lines(lines: Iterable[Mapping[str, Any]], check: str = "") -> tuple[bytes, str]:
    """Return lines one after the other, and the checksum of the last."""
    content = b""
    for fields in lines:
        line, check = sealed(fields, check)
        content += line
    return content, check


def _check(text: bytes, before: str) -> str:
    return hashlib.sha256(before.encode() + b"\n" + text).hexdigest()[:16]


def _why(error: OSError) -> str:
    told = error.strerror or str(error)
    return f"the disk is full ({told})" if is_full(error) else told
