"""How a definition in this folder reads its rows: ``custom_dataset: !function rows.read``.

The harness loads this file by itself, next to the definition that names it.
"""

import json
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from datasets import Dataset

from pared.data.files import data_file, read_lines, read_rows
from pared.errors import ParedError

Row = Mapping[str, Any]


def read(
    file: str,
    fields: Mapping[str, Any],
    shown: str | None = None,
    where: Mapping[str, str] | None = None,
    **_: object,
) -> dict[str, Dataset]:
    """Return the rows of a task by split: ``test``, and ``shown`` if it has examples to show.

    Args:
        file: under ``PARED_DATA``: .jsonl, .jsonl.gz, or .tsv with a header.
        fields: of a row, from name to kind: ``text``; ``choices``, two texts or more, with a number so many, with a
            list these; ``gold``, which of them is right, from 0; or a list, one of these texts.
        shown: the file of the examples.
        where: what fields of a row must be for the row to count; those are texts.

    Raises:
        ParedError: no such file, no rows, or a row that is not of this kind; names the file and the row.
    """
    chosen = dict(where or {})
    kinds = {**dict.fromkeys(chosen, "text"), **fields}
    found = {}
    for split, name in {"test": file, **({} if shown is None else {"shown": shown})}.items():
        path = data_file(name, name)
        rows = _rows_of(path, path.stat().st_mtime_ns, json.dumps(kinds))
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
    kinds: str,
) -> list[dict[str, Any]]:
    """Read and check every row of a file, once for all subjects; kinds are JSON, which can be looked up."""
    wanted = json.loads(kinds)
    rows = []
    for number, row in _read(path):
        if not isinstance(row, dict):
            raise ParedError(f"{path}, row {number}: expected {', '.join(wanted)}, got {type(row).__name__}")
        for name, kind in wanted.items():
            if name not in row:
                raise ParedError(f"{path}, row {number}: {name} is missing; got {', '.join(sorted(row))}")
            expected = _expected(row[name], kind, row)
            if expected:
                raise ParedError(f"{path}, row {number}: {name} is {row[name]!r}, expected {expected}")
        rows.append({name: row[name] for name in wanted})
    return rows


def _expected(value: Any, kind: Any, row: Row) -> str:
    """Return what was expected in the place of a value, nothing if it is of its kind."""
    if isinstance(kind, list):
        return "" if value in kind else f"one of {', '.join(kind)}"
    if kind == "text":
        return "" if _is_text(value) else "a text"
    if kind == "gold":
        count = next((len(own) for own in row.values() if isinstance(own, list)), 0)
        fits = isinstance(value, int) and not isinstance(value, bool) and 0 <= value < count
        return "" if fits else f"0 to {count - 1}, one of its {count} choices"
    wanted = kind["choices"] if isinstance(kind, dict) else None
    if isinstance(wanted, list):
        return "" if value == wanted else f"the choices {', '.join(wanted)}, in this order"
    texts = isinstance(value, list) and all(map(_is_text, value))
    fits = texts and (len(value) == wanted if wanted is not None else len(value) > 1)
    return "" if fits else f"a list of {'two texts or more' if wanted is None else f'{wanted} texts'}"


def _is_text(value: object) -> bool:
    return isinstance(value, str) and bool(value.strip())


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
                raise ParedError(f"{path}, row {number}: expected {len(names)} columns, got {len(cells)}")
            yield number, dict(zip(names, cells, strict=True))
