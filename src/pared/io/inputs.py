"""Local files and folders that are read: an output must not touch them, and what is published must not reveal them.

What is published names a file or folder by its last name and its SHA-256. Where it lies on this machine is kept in the
user's cache folder under that SHA-256, so that a training still finds the model and the text its parent was made with.
"""

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from pared.io.digests import file_digest, folder_digest
from pared.io.files import cache_folder, path_of, write_whole
from pared.names import PART

MADE = ("out", "report_to")  # keys whose values are written, or are no names of places
MODELS = ("model", "teacher", "parent")  # keys whose values may be a folder's name without a separator
FILE = "file:"


def inputs_of(asked: Mapping[str, Any]) -> list[Path]:
    """Return the local files and folders that a recipe, or a training, as plain data, reads."""
    return list(dict.fromkeys(path for key, value in _strings(asked) if (path := _path(key, value)) is not None))


def digest_of_input(path: Path) -> str:
    """Return the SHA-256 of a file, or the digest of a model folder.

    Raises:
        OSError: it cannot be read.
    """
    return folder_digest(path) if path.is_dir() else file_digest(path)


def told_apart(paths: Iterable[Path]) -> dict[str, tuple[Path, str]]:
    """Return for every file or folder the name it is published by, with its path and digest; equal names differ."""
    found: dict[str, tuple[Path, str]] = {}
    for path in paths:
        digest = digest_of_input(path)
        name = _last_name(path)
        if name in found and found[name][1] != digest:
            name = f"{Path(name).stem}-{digest[:8]}{Path(name).suffix}"
        found[name] = (path, digest)
    return found


def without_places(value: Any, published: Mapping[str, tuple[Path, str]], key: str = "", above: str = "") -> Any:
    """Return plain data in which every local place is a last name: of what is listed, and of any absolute path.

    What may be called like a place and is none (the key ``model``, the method ``svd``) stays: a name without a
    separator is a place only where a model's name stands, or behind ``file:``.

    Args:
        value: strings, lists and mappings.
        published: as :func:`told_apart` gives it.
        key: that the value stands under.
        above: the key that the mapping with that key stands under.
    """
    if isinstance(value, Mapping):
        return {
            _told(name, published, False) if isinstance(name, str) and _has_separator(name) else name:
                without_places(one, published, str(name), key)
            for name, one in value.items()
        }  # fmt: skip
    if isinstance(value, (list, tuple)):
        return [without_places(one, published, key, above) for one in value]
    if isinstance(value, str):
        return _told(value, published, key in MODELS or (key == "name" and above in MODELS))
    return value


def _told(value: str, published: Mapping[str, tuple[Path, str]], of_model: bool) -> str:
    """Return a string with last names for places; only one that names a model may be a place without a separator."""
    if part := PART.search(value):
        return _told(value[: part.start()], published, of_model) + part.group()
    spellings, parts = _spellings(published), value.split(":")
    for start in range(len(parts)):
        named = ":".join(parts[start:])
        if not (_has_separator(named) or value.startswith(FILE) or (of_model and start == 0)):
            continue
        name = spellings.get(named) or (spellings.get(_whole(Path(named))) if _has_separator(named) else None)
        if name is not None:
            return ":".join([*parts[:start], name])
    for spelling in sorted(spellings, key=len, reverse=True):
        if os.path.isabs(spelling):
            value = value.replace(spelling, spellings[spelling])
    head, colon, tail = value.rpartition(":")
    is_place = (os.path.isabs(tail) or tail.startswith("~")) and not tail.startswith("//")
    if is_place and len(Path(tail).parts) > 2:  # "/think" is a token
        return head + colon + _last_name(Path(tail))
    return value


def remember(published: Mapping[str, tuple[Path, str]]) -> None:
    """Keep where inputs lie on this machine, in the user's cache folder."""
    for path, digest in published.values():
        with suppress(OSError):  # a cache that cannot be written is no reason to stop
            place = _place(digest)
            place.parent.mkdir(parents=True, exist_ok=True)
            write_whole(place, json.dumps(str(Path(os.path.realpath(path)))))


def found_again(name: str, published: Mapping[str, str]) -> str:
    """Return the name of a model or text with its place on this machine, or as it is where that is not known.

    Args:
        name: as it is published: ``llama``, ``file:words.txt``.
        published: SHA-256 by name, as a manifest records it.
    """
    if part := PART.search(name):
        return found_again(name[: part.start()], published) + part.group()
    parts = name.split(":")
    for start in range(len(parts)):
        digest = published.get(":".join(parts[start:]))
        if digest is not None and (path := _recall(digest)) is not None:
            return ":".join([*parts[:start], str(path)])
    return name


def _recall(digest: str) -> Path | None:
    """Return where a file or folder of a digest lies, if it still lies there."""
    try:
        path = Path(json.loads(_place(digest).read_text(encoding="utf-8")))
        return path if path.exists() and digest_of_input(path) == digest else None
    except (OSError, ValueError, TypeError):
        return None


def _place(digest: str) -> Path:
    return cache_folder() / "places" / f"{digest[:32]}.json"


def _strings(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Yield every string with the key it stands under; what is written is left out."""
    if isinstance(value, Mapping):
        for name, one in value.items():
            if name not in MADE:
                yield from _strings(one, str(name))
    elif isinstance(value, (list, tuple)):
        for one in value:
            yield from _strings(one, key)
    elif isinstance(value, str):
        yield key, value


def _path(key: str, value: str) -> Path | None:
    """Return the file or folder that a string names, None if it names none."""
    if part := PART.search(value):
        return _path(key, value[: part.start()])
    if len(value) > 4000 or "\0" in value or "\n" in value:
        return None
    parts = value.split(":")
    candidates = [value] if key in MODELS or _has_separator(value) else []
    for candidate in (":".join(parts[start:]) for start in range(1, len(parts))):
        if candidate and (value.startswith(FILE) or _has_separator(candidate)):
            candidates.append(candidate)
    for candidate in candidates:
        with suppress(OSError, RuntimeError):
            if candidate.strip() and (path := path_of(candidate)).exists():
                return path
    return None


def _has_separator(name: str) -> bool:
    return "/" in name or os.sep in name or name.startswith("~")


def _spellings(published: Mapping[str, tuple[Path, str]]) -> dict[str, str]:
    """Return the ways a place may have been written, with its last name."""
    found: dict[str, str] = {}
    for name, (path, _) in published.items():
        for spelling in (path, path_of(path), path_of(path).absolute(), _whole(path)):
            found[str(spelling)] = name
    return found


def _whole(path: Path) -> str:
    try:
        return os.path.realpath(path_of(path))
    except (OSError, RuntimeError, ValueError):
        return ""


def _last_name(path: Path) -> str:
    return path.name or Path(os.path.realpath(path_of(path))).name or "folder"
