"""How a definition in this folder reads its rows: ``custom_dataset: !function rows.read``.

The harness loads this file by itself, beside the definition that names it.
"""

import os
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from datasets import Dataset

from pared.errors import ParedError
from pared.sources.files import read_lines, read_rows

Row = Mapping[str, Any]


def read(
    file: str,
    fields: Mapping[str, str],
    shown: str | None = None,
    where: Mapping[str, str] | None = None,
    **_: object,
) -> dict[str, Dataset]:
    """Return the rows of a task by split: ``test``, and ``shown`` if it has examples to show.

    Args:
        file: under ``PARED_DATA``: .jsonl, .jsonl.gz, or .tsv with a header.
        fields: of a row, from name to kind: ``text``, ``choices`` (two texts or more) or ``gold`` (which of them is
            right, from 0).
        shown: the file of the examples.
        where: what fields of a row must be for the row to count; those are texts.

    Raises:
        ParedError: no such file, no rows, or a row that is not of this kind; names the file and the row.
    """
    chosen = dict(where or {})
    splits = {"test": file} | ({} if shown is None else {"shown": shown})
    found = {}
    for split, name in splits.items():
        path = _path(name)
        rows = _rows_of(path, path.stat().st_mtime_ns, tuple(fields.items()), tuple(chosen))
        kept = [row for row in rows if all(row[field] == value for field, value in chosen.items())]
        if not kept:
            of = "".join(f" of {field} {value!r}" for field, value in chosen.items())
            raise ParedError(f"{path} has no rows{of}")
        found[split] = Dataset.from_list(kept)
    return found


@cache
def _rows_of(
    path: Path,
    written: int,  # noqa: ARG001 - when, so that a file that changed is read again
    fields: tuple[tuple[str, str], ...],
    texts: tuple[str, ...],
) -> list[dict[str, Any]]:
    """Read and check every row of a file, once for all subjects."""
    kinds = dict(fields) | dict.fromkeys(texts, "text")
    rows = []
    for number, row in _read(path):
        if not isinstance(row, dict):
            raise ParedError(f"{path}, row {number}: expected {', '.join(kinds)}, found {type(row).__name__}")
        for name, kind in kinds.items():
            if name not in row:
                raise ParedError(f"{path}, row {number}: {name} is missing; found {', '.join(sorted(row))}")
            wrong = KINDS[kind](row[name], row)
            if wrong:
                raise ParedError(f"{path}, row {number}: {name} is {row[name]!r}, expected {wrong}")
        rows.append({name: row[name] for name in kinds})
    return rows


def _not_text(value: object, row: Row) -> str:  # noqa: ARG001 - like the others
    return "" if isinstance(value, str) and value.strip() else "a text"


def _not_choices(value: object, row: Row) -> str:
    fits = isinstance(value, list) and len(value) > 1 and not any(_not_text(one, row) for one in value)
    return "" if fits else "a list of two texts or more"


def _not_gold(value: object, row: Row) -> str:
    count = next((len(own) for own in row.values() if isinstance(own, list)), 0)
    fits = isinstance(value, int) and not isinstance(value, bool) and 0 <= value < count
    return "" if fits else f"0 to {count - 1}, one of its {count} choices"


KINDS: dict[str, Callable[[Any, Row], str]] = {"text": _not_text, "choices": _not_choices, "gold": _not_gold}


def _path(file: str) -> Path:
    root = os.environ.get("PARED_DATA")
    if not root:
        raise ParedError(f"{file} is read from the folder that PARED_DATA names, and it names none; set it")
    path = Path(root) / file
    if not path.is_file():
        raise ParedError(f"PARED_DATA has no {file} (looked for {path})")
    return path


def _read(path: Path) -> Iterator[tuple[int, Any]]:
    if ".tsv" not in path.suffixes:
        yield from read_rows(path)
        return
    header, *lines = read_lines(path)
    names = header.split("\t")
    for number, line in enumerate(lines, 2):
        cells = line.split("\t")
        if line.strip():
            if len(cells) != len(names):
                raise ParedError(f"{path}, row {number}: expected {len(names)} columns, found {len(cells)}")
            yield number, dict(zip(names, cells, strict=True))
