"""Labelled examples by name: GLUE and entity recognition in the folder PARED_DATA, and the user's files."""

import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pared.errors import ParedError
from pared.names import did_you_mean
from pared.sources.files import read_lines, read_rows

log = logging.getLogger(__name__)

Label = int | float | str
BINARY = ("0", "1")
ENTAILMENT = ("entailment", "not_entailment")
ENTITIES = ("corporation", "creative-work", "group", "location", "person", "product")


@dataclass(frozen=True)
class Example:
    """One labelled example.

    Attributes:
        texts: one text or a pair; of a token classification the words.
        label: of the whole example, or one a word.
    """

    texts: tuple[str, ...]
    label: Label | tuple[Label, ...]

    @property
    def by_word(self) -> bool:
        """Whether every word has a label."""
        return isinstance(self.label, tuple)


@dataclass(frozen=True)
class Examples:
    """Labelled examples by name.

    Attributes:
        name: what the user called them.
        rows: all with one label, or all with one a word.
        origin: the file they were read from.
        classes: the order the data set itself gives its classes, for a model that has no names for its own.
    """

    name: str
    rows: tuple[Example, ...]
    origin: str
    classes: tuple[str, ...] = ()

    @property
    def by_word(self) -> bool:
        """Whether every word has a label."""
        return self.rows[0].by_word


@dataclass(frozen=True)
class _Task:
    """A GLUE task: its files, where texts and label stand in a row, and the names of its classes.

    ``label`` counts columns from 0, negative ones from the last; a task with ``scores`` is a regression, and of one
    without names for its classes they are 0 and 1. A task that is ``torn`` has rows that are too short in the data set
    itself, which are left out.
    """

    folder: str
    texts: tuple[int, ...]
    label: int
    header: bool = True
    classes: tuple[str, ...] = ()
    dev: str = "dev"
    scores: bool = False
    torn: bool = False


GLUE = {
    "cola": _Task("CoLA", (3,), 1, header=False),
    "sst2": _Task("SST-2", (0,), 1),
    "mrpc": _Task("MRPC", (3, 4), 0),
    "stsb": _Task("STS-B", (7, 8), 9, scores=True),
    "mnli": _Task("MNLI", (8, 9), -1, classes=("entailment", "neutral", "contradiction"), dev="dev_matched"),
    "qqp": _Task("QQP", (3, 4), 5, torn=True),
    "qnli": _Task("QNLI", (1, 2), 3, classes=ENTAILMENT),
    "rte": _Task("RTE", (1, 2), 3, classes=ENTAILMENT),
    "wnli": _Task("WNLI", (1, 2), 3),
}
SETS = ("glue:", "ner:")
SPLITS = {"train": "train", "validation": "dev", "dev": "dev", "test": "test_labelled"}
ENTITY_CLASSES = {"wnut17": ("O", *(f"{mark}-{kind}" for kind in ENTITIES for mark in "BI"))}


def is_labelled(name: str) -> bool:
    """Whether a name is one of labelled examples rather than of a text; of a .jsonl file its first row decides."""
    if name.startswith(SETS):
        return True
    path = Path(name.removeprefix("file:")).expanduser()
    if not name.startswith("file:") or ".jsonl" not in path.suffixes:
        return False
    try:
        first = json.loads(read_lines(path)[0])
    except (ParedError, ValueError, IndexError):
        return False
    return isinstance(first, dict) and ("label" in first or "labels" in first)


def find_examples(name: str) -> Examples:
    """Find labelled examples by name.

    Args:
        name: ``glue:TASK:SPLIT`` (cola, sst2, mrpc, stsb, mnli, qqp, qnli, rte, wnli; train, validation or dev, test
            where its labels are known), ``ner:NAME:SPLIT`` (``ner/NAME/SPLIT.txt`` in PARED_DATA: a word and its tag in
            a line, a blank line between sentences), or ``file:PATH`` (.jsonl or .jsonl.gz with ``text``, perhaps
            ``text_pair``, and ``label``; or with ``tokens`` and ``labels``).

    Raises:
        ParedError: nothing of that name, unreadable, without rows, or a row that is not such an example; names the
            file and the row.
    """
    kind, _, rest = name.partition(":")
    if kind == "file":
        path = Path(rest).expanduser()
        found = Examples(name, tuple(_rows_of_file(path)), str(path))
    elif kind == "glue" and rest.count(":") == 1:
        found = _glue(name, *rest.split(":"))
    elif kind == "ner" and rest.count(":") == 1:
        found = _entities(name, *rest.split(":"))
    else:
        valid = [f"glue:{task}:train" for task in GLUE] + [f"ner:{known}:train" for known in ENTITY_CLASSES]
        raise ParedError(f"unknown labelled examples {name!r}; {did_you_mean(name, valid)}, file:PATH")
    if not found.rows:
        raise ParedError(f"labelled examples {name!r} ({found.origin}) have no rows")
    for number, row in enumerate(found.rows, 1):
        if row.by_word != found.by_word:
            raise ParedError(
                f"{found.origin}, example {number}: expected {'labels, one a word,' if found.by_word else 'one label'} "
                "as in the first example; use one kind in a file"
            )
    return found


def _glue(name: str, task: str, split: str) -> Examples:
    if task not in GLUE:
        raise ParedError(f"labelled examples {name!r}: no GLUE task {task!r} here; {did_you_mean(task, GLUE)}")
    if split not in SPLITS:
        raise ParedError(f"labelled examples {name!r}: no split {split!r}; {did_you_mean(split, SPLITS)}")
    asked = GLUE[task]
    file = asked.dev if SPLITS[split] == "dev" else SPLITS[split]
    path = _local(name, f"glue/{asked.folder}", file, (".tsv", ".tsv.gz"))
    width = max(*asked.texts, asked.label) + 1

    def rows() -> Iterator[Example]:
        for number, line in enumerate(read_lines(path), 1):
            cells = line.split("\t")
            if not line.strip() or (asked.header and number == 1):
                continue
            if len(cells) < width and asked.torn:
                log.warning("%s, row %d: %d columns; left out", path, number, len(cells))
                continue
            if len(cells) < width:
                raise ParedError(f"{path}, row {number}: expected at least {width} columns, found {len(cells)}")
            label = cells[asked.label].strip()
            texts = tuple(cells[i].strip() for i in asked.texts)
            if asked.scores:
                yield Example(texts, _score(label, path, number))
            else:
                valid = asked.classes or BINARY
                if label not in valid:
                    raise ParedError(f"{path}, row {number}: expected a label of {', '.join(valid)}, found {label!r}")
                yield Example(texts, int(label) if label.isdigit() else label)

    return Examples(name, tuple(rows()), str(path), asked.classes)


def _score(label: str, path: Path, number: int) -> float:
    try:
        return float(label)
    except ValueError:
        raise ParedError(f"{path}, row {number}: expected a score, found {label!r}") from None


def _entities(name: str, data_set: str, split: str) -> Examples:
    path = _local(name, f"ner/{data_set}", "dev" if split == "validation" else split, (".txt", ".txt.gz"))

    def rows() -> Iterator[Example]:
        words: list[tuple[str, str]] = []
        for number, line in enumerate([*read_lines(path), ""], 1):
            if line.strip():
                cells = line.split("\t") if "\t" in line else line.split()
                if len(cells) < 2 or not cells[0].strip():
                    raise ParedError(f"{path}, line {number}: expected a word and its tag, found {line!r}")
                words.append((cells[0].strip(), cells[-1].strip()))
            elif words:
                if words[0][0] != "-DOCSTART-":  # CoNLL's mark of a new document
                    yield Example(tuple(word for word, _ in words), tuple(tag for _, tag in words))
                words = []

    return Examples(name, tuple(rows()), str(path), ENTITY_CLASSES.get(data_set, ()))


def _local(name: str, folder: str, split: str, endings: Sequence[str]) -> Path:
    """Return the file of a split under PARED_DATA."""
    root = os.environ.get("PARED_DATA")
    if not root:
        raise ParedError(
            f"labelled examples {name!r} are read from the folder that PARED_DATA names, and it names none; set it, or "
            "use file:PATH"
        )
    for ending in endings:
        if (path := Path(root) / folder / f"{split}{ending}").is_file():
            return path
    there = sorted(path.name for path in (Path(root) / folder).glob("*"))
    raise ParedError(
        f"labelled examples {name!r}: PARED_DATA names {root}, which has no {folder}/{split}{endings[0]}; "
        f"found there: {', '.join(there) or 'nothing'}"
    )


def _rows_of_file(path: Path) -> Iterator[Example]:
    if ".jsonl" not in path.suffixes:
        raise ParedError(f"labelled file {path}: expected .jsonl or .jsonl.gz, found {path.suffix or 'no suffix'}")
    for number, row in read_rows(path):
        example = _example(row) if isinstance(row, dict) else None
        if example is None:
            found = sorted(row) if isinstance(row, dict) else type(row).__name__
            raise ParedError(
                f"{path}, row {number}: expected 'text' (perhaps 'text_pair') and a 'label', a number or a string, "
                f"or 'tokens' and as many 'labels'; found {found}"
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
