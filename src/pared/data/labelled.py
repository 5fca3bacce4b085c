"""Labelled examples by name: GLUE, entity recognition in the folder PARED_DATA, and the user's files."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pared.data.examples import Example, Examples
from pared.data.files import data_file, read_lines, read_rows, require_there
from pared.data.glue import GLUE, glue, glue_place
from pared.errors import ParedError
from pared.io.files import path_of
from pared.io.guarded import brief
from pared.names import did_you_mean

SETS = ("glue:", "ner:")
ENTITIES = ("corporation", "creative-work", "group", "location", "person", "product")
ENTITY_CLASSES = {"wnut17": ("O", *(f"{mark}-{kind}" for kind in ENTITIES for mark in "BI"))}


def is_labelled(name: str) -> bool:
    """Whether a name is one of labelled examples rather than of a text; of a .jsonl file its first row decides."""
    if name.startswith(SETS):
        return True
    path = path_of(name.removeprefix("file:"))
    if not name.startswith("file:") or ".jsonl" not in path.suffixes:
        return False
    try:
        first = json.loads(read_lines(path)[0])
    except (ParedError, ValueError, IndexError):
        return False
    return isinstance(first, dict) and ("label" in first or "labels" in first)


def require_examples(name: str) -> None:
    """Check that a name is one of labelled examples, without reading them.

    Args:
        name: as :func:`find_examples`.

    Raises:
        ParedError: nothing of that name; offers the nearest.
    """
    kind, _, rest = name.partition(":")
    if kind == "file":
        path = path_of(rest)
        if ".jsonl" not in path.suffixes:
            raise ParedError(f"labelled file {path}: expected .jsonl or .jsonl.gz, got {path.suffix or 'no suffix'}")
        require_there(path, "file")
    elif kind == "glue" and rest.count(":") == 1:
        glue_place(name, *rest.split(":"))
    elif kind == "ner" and rest.count(":") == 1:
        _file_of_entities(name, *rest.split(":"))
    else:
        valid = [f"glue:{task}:train" for task in GLUE] + [f"ner:{known}:train" for known in ENTITY_CLASSES]
        raise ParedError(f"unknown labelled examples {brief(name)}; {did_you_mean(name[:200], valid)}, file:PATH")


def parts_of_task(task: str) -> tuple[str, str]:
    """Return the names of the examples that an encoder is trained on for a task, and scored on.

    Args:
        task: ``glue:NAME``, or ``ner:NAME``.

    Raises:
        ParedError: there is no such task, or a part of it is missing.
    """
    kind, _, name = task.partition(":")
    if kind not in ("glue", "ner") or not name or ":" in name:
        raise ParedError(f"unknown task {task!r} for an encoder; expected glue:NAME, such as glue:cola, or ner:NAME")
    parts = f"{task}:train", f"{task}:{'dev' if kind == 'glue' else 'test'}"
    for part in parts:
        require_examples(part)
    return parts


def find_examples(name: str) -> Examples:
    """Find labelled examples by name.

    Args:
        name: ``glue:TASK:SPLIT`` (cola, sst2, mrpc, stsb, mnli, mnli-mm, qqp, qnli, rte, wnli; train, validation or
            dev, test where its labels are known), ``ner:NAME:SPLIT`` (``ner/NAME/SPLIT.txt`` in PARED_DATA: a word and
            its tag in a line, a blank line between sentences), or ``file:PATH`` (.jsonl or .jsonl.gz with ``text``,
            perhaps ``text_pair``, and ``label``; or with ``tokens`` and ``labels``).

    Raises:
        ParedError: nothing of that name, unreadable, without rows, or a row that is not such an example; names the
            file and the row.
    """
    require_examples(name)
    kind, _, rest = name.partition(":")
    if kind == "file":
        path = path_of(rest)
        found = Examples(name, tuple(_rows_of_file(path)), str(path))
    elif kind == "glue":
        found = glue(name, *rest.split(":"))
    else:
        found = _entities(name, *rest.split(":"))
    if not found.rows:
        raise ParedError(f"labelled examples {name!r} ({found.origin}) have no rows")
    for number, row in enumerate(found.rows, 1):
        if row.by_word != found.by_word:
            raise ParedError(
                f"{found.origin}, example {number}: expected {'labels, one a word,' if found.by_word else 'one label'} "
                "as in the first example; use one kind in a file"
            )
    return found


def _file_of_entities(name: str, data_set: str, split: str) -> Path:
    file = f"ner/{data_set}/{'dev' if split == 'validation' else split}.txt"
    return data_file(file, f"labelled examples {name!r}", "use file:PATH")


def _entities(name: str, data_set: str, split: str) -> Examples:
    path = _file_of_entities(name, data_set, split)

    def rows() -> Iterator[Example]:
        words: list[tuple[str, str]] = []
        for number, line in enumerate([*read_lines(path), ""], 1):
            if line.strip():
                cells = line.split("\t") if "\t" in line else line.split()
                if len(cells) < 2 or not cells[0].strip():
                    raise ParedError(f"{path}, line {number}: expected a word and its tag, got {line!r}")
                words.append((cells[0].strip(), cells[-1].strip()))
            elif words:
                if words[0][0] != "-DOCSTART-":  # CoNLL's mark of a new document
                    yield Example(tuple(word for word, _ in words), tuple(tag for _, tag in words))
                words = []

    return Examples(name, tuple(rows()), str(path), ENTITY_CLASSES.get(data_set, ()))


def _rows_of_file(path: Path) -> Iterator[Example]:
    for number, row in read_rows(path):
        example = _example(row) if isinstance(row, dict) else None
        if example is None:
            found = sorted(row) if isinstance(row, dict) else type(row).__name__
            raise ParedError(
                f"{path}, row {number}: expected 'text' (perhaps 'text_pair') and a 'label', a number or a string, "
                f"or 'tokens' and as many 'labels'; got {found}"
            )
        yield example


def _example(row: Mapping[str, Any]) -> Example | None:
    """Return what a row of JSON says, None if it is no example."""
    words, labels = row.get("tokens"), row.get("labels")
    if isinstance(words, list) and isinstance(labels, list):
        fits = len(words) == len(labels) > 0 and all(isinstance(word, str) for word in words)
        return Example(tuple(words), tuple(labels)) if fits and all(map(_is_label, labels)) else None
    texts = [row[key] for key in ("text", "text_pair") if row.get(key) is not None]
    fits = "text" in row and all(isinstance(text, str) for text in texts) and _is_label(row.get("label"))
    return Example(tuple(texts), row["label"]) if fits and texts else None


def _is_label(value: object) -> bool:
    return isinstance(value, (int, float, str)) and not isinstance(value, bool)
