"""Files that users name; a damaged or hostile one is reported in one line: no traceback, no hang, no flood.

A path must lead to a regular file of a bearable size; a gzipped one may not grow without bound; JSON and YAML may not
nest without end, hold numbers of thousands of digits, name a key twice, or multiply themselves by aliases.
"""

import io
import json
import os
import stat
import zlib
from collections.abc import Iterable, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pared.errors import ParedError

# Limits; nothing legitimate comes near them.
MOST_BYTES = 2**28  # of a file of settings or records; the manifest of a model of 100,000 layers has fewer
MOST_YAML_BYTES = 2**20
MOST_DEPTH = 100
MOST_DIGITS = 100
MOST_YAML_NODES = 100_000  # once aliases are written out
UNPACKED_UNASKED = 2**26  # so much a gzipped file may always hold
MOST_RATIO = 100  # and more only if it is not packed denser than this; prose is packed to a third


def read_bytes(path: Path, what: str, most: int | None = None) -> bytes:
    """Read a regular file.

    Args:
        path: of it.
        what: it is, for messages.
        most: bytes that it may have; any number if None.

    Raises:
        ParedError: it is not there, not a regular file (a pipe, a device, a folder), unreadable or too large.
    """
    try:
        # Without waiting: opening a pipe that has no writer would never return.
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0))
        with os.fdopen(handle, "rb") as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise ParedError(f"{what} {path}: not a regular file; copy its content into one")
            if most is not None and status.st_size > most:
                raise ParedError(f"{what} {path}: {status.st_size:,} bytes, expected {most:,} at most")
            return file.read()
    except ParedError:
        raise
    except OSError as error:
        raise ParedError(f"{what} {path}: {error.strerror or error}") from None
    except ValueError as error:  # a name that holds a zero byte
        raise ParedError(f"{what} {str(path)[:200]!r}: {error}") from None


def unzipped(raw: bytes, origin: str) -> bytes:
    """Return the content of a gzipped file.

    Raises:
        ParedError: it is damaged, or grows without bound.
    """
    out, left = io.BytesIO(), raw
    try:
        while left:
            member = zlib.decompressobj(wbits=31)
            while left and not member.eof:
                out.write(member.decompress(left, 2**20))
                left = member.unconsumed_tail or (member.unused_data if member.eof else b"")
                if out.tell() > max(UNPACKED_UNASKED, MOST_RATIO * len(raw)):
                    raise ParedError(
                        f"{origin}: {len(raw):,} bytes unpack to more than {out.tell():,}; no text is packed as "
                        "densely: unpack it yourself if that is meant"
                    )
            if not member.eof:
                raise ParedError(f"{origin}: not readable as gzip (it ends too early)")
            left = left.lstrip(b"\0")  # filling behind the last member
    except zlib.error as error:
        raise ParedError(f"{origin}: not readable as gzip ({error})") from None
    return out.getvalue()


def parse_json(text: str | bytes, origin: str, unique: bool = True) -> Any:
    """Read JSON.

    Args:
        text: of it.
        origin: for messages: the file, and the line where it has several.
        unique: refuse a mapping that names a key twice.

    Raises:
        ParedError: not JSON, or beyond the limits.
    """
    with _told(origin, "not JSON"):
        found = json.loads(text, object_pairs_hook=_pairs if unique else None, parse_int=_whole)
        _require_shallow(found)
        return found


def read_json(path: Path, what: str, most: int = MOST_BYTES, unique: bool = True) -> Any:
    """Read a file of JSON; see :func:`read_bytes` and :func:`parse_json`."""
    return parse_json(read_bytes(path, what, most), f"{what} {path}", unique)


def parse_yaml(text: str | bytes, origin: str) -> Any:
    """Read YAML of plain data.

    Raises:
        ParedError: not YAML, or beyond the limits.
    """
    import yaml

    with _told(origin, "not readable as YAML"):
        try:
            loader = yaml.SafeLoader(text.decode("utf-8-sig") if isinstance(text, bytes) else text)
            try:
                node = loader.get_single_node()
                if node is None:
                    return None
                _require_bounded(node)
                return loader.construct_document(node)
            finally:
                loader.dispose()
        except yaml.YAMLError as error:
            raise ValueError(" ".join(str(error).split())) from None


def read_yaml(path: Path, what: str) -> Any:
    """Read a file of YAML; see :func:`read_bytes` and :func:`parse_yaml`."""
    return parse_yaml(read_bytes(path, what, MOST_YAML_BYTES), f"{what} {path}")


@contextmanager
def _told(origin: str, kind: str) -> Any:
    try:
        yield
    except ParedError:
        raise
    except RecursionError:
        raise ParedError(f"{origin}: {kind}: nested too deeply, {MOST_DEPTH} levels at most") from None
    except (ValueError, TypeError, OverflowError, AttributeError) as error:  # json's and PyYAML's of odd values
        raise ParedError(f"{origin}: {kind}: {str(error)[:300]}") from None


def _whole(digits: str) -> int:
    if len(digits) > MOST_DIGITS:
        raise ValueError(f"a number of {len(digits):,} digits, {MOST_DIGITS} at most")
    return int(digits)


def _pairs(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice[:100]!r} stands there twice")
    return found


def _require_shallow(value: Any) -> None:
    level, depth = [value], 0
    while level:
        depth += 1
        if depth > MOST_DEPTH:
            raise RecursionError
        level = [inner for one in level for inner in _inside(one) if isinstance(inner, (dict, list))]


def _inside(value: Any) -> Iterable[Any]:
    return value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()


def _require_bounded(root: Any) -> None:
    """Refuse what is endless or enormous once its aliases are written out, or names a key twice."""
    sizes: dict[int, int] = {}
    above: set[int] = set()

    def size(node: Any, depth: int) -> int:
        if id(node) in sizes:
            return sizes[id(node)]
        if id(node) in above:
            raise ValueError("an alias is nested in what it names")
        if depth > MOST_DEPTH:
            raise RecursionError
        if node.id == "scalar":
            if node.tag.endswith(":int") and len(node.value) > MOST_DIGITS:
                raise ValueError(f"a number of {len(node.value):,} digits, {MOST_DIGITS} at most")
            sizes[id(node)] = 1
            return 1
        above.add(id(node))
        inside = [part for pair in node.value for part in pair] if node.id == "mapping" else node.value
        total = 1 + sum(size(part, depth + 1) for part in inside)
        if total > MOST_YAML_NODES:
            raise ValueError(f"more than {MOST_YAML_NODES:,} values once its aliases are written out")
        if node.id == "mapping":
            _pairs([(key.value, None) for key, _ in node.value if key.id == "scalar" and key.value != "<<"])
        above.discard(id(node))
        sizes[id(node)] = total
        return total

    size(root, 0)


def require_regular_files(folder: Path) -> None:
    """Refuse a folder that holds anything but files and folders: reading a pipe in place of a file would never end.

    Raises:
        ParedError: names what stands there.
    """
    try:
        with os.scandir(folder) as found:
            for entry in found:
                mode = entry.stat().st_mode if not entry.is_symlink() or os.path.exists(entry.path) else stat.S_IFREG
                if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
                    raise ParedError(f"{folder}: {entry.name} is not a regular file; fetch or make the folder again")
    except OSError as error:
        raise ParedError(f"{folder}: {error.strerror or error}") from None


def brief(value: object, most: int = 200) -> str:
    """Return a value as it is quoted in a message, never more than a line."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # a number of thousands of digits; nesting without end
        return f"a {type(value).__name__} that is too long to print"
    return text if len(text) <= most else f"{text[:most]}..."
