"""GLUE (Wang et al., 2019): its own files under ``PARED_DATA``, or the Hub where that names no folder."""

import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from pared.data.examples import Example, Examples
from pared.data.files import data_file, data_folder, read_lines
from pared.data.hub import HubSet
from pared.errors import ParedError
from pared.names import did_you_mean

log = logging.getLogger(__name__)

BINARY = ("0", "1")
ENTAILMENT = ("entailment", "not_entailment")
SPLITS = {"train": "train", "validation": "dev", "dev": "dev", "test": "test"}


@dataclass(frozen=True)
class _Task:
    """A GLUE task: its files, where texts and label stand in a row, and the names of its classes.

    ``label`` counts columns from 0, negative ones from the last; ``fields`` are those of the texts on the Hub, whose
    labels count the classes. A task with ``scores`` is a regression, and of one without names for its classes they are
    0 and 1. A task that is ``torn`` has rows that are too short in the data set itself, which are left out.
    """

    folder: str
    texts: tuple[int, ...]
    label: int
    fields: tuple[str, ...] = ("sentence1", "sentence2")
    header: bool = True
    classes: tuple[str, ...] = ()
    dev: str = "dev"
    scores: bool = False
    torn: bool = False


MNLI = _Task("MNLI", (8, 9), -1, ("premise", "hypothesis"), classes=("entailment", "neutral", "contradiction"),
             dev="dev_matched")  # fmt: skip
GLUE = {
    "cola": _Task("CoLA", (3,), 1, ("sentence",), header=False),
    "sst2": _Task("SST-2", (0,), 1, ("sentence",)),
    "mrpc": _Task("MRPC", (3, 4), 0),
    "stsb": _Task("STS-B", (7, 8), 9, scores=True),
    "mnli": MNLI,
    "mnli-mm": replace(MNLI, dev="dev_mismatched"),
    "qqp": _Task("QQP", (3, 4), 5, ("question1", "question2"), torn=True),
    "qnli": _Task("QNLI", (1, 2), 3, ("question", "sentence"), classes=ENTAILMENT),
    "rte": _Task("RTE", (1, 2), 3, classes=ENTAILMENT),
    "wnli": _Task("WNLI", (1, 2), 3),
}


def glue(name: str, task: str, split: str) -> Examples:
    """Return the examples of a task.

    Args:
        name: what the user called them.
        task: of ``GLUE``.
        split: train, validation or dev, and test where the folder has its labels.

    Raises:
        ParedError: no such task or split, the data cannot be read, or a row is not of the task; names the file and the
            row.
    """
    where = glue_place(name, task, split)
    asked = GLUE[task]
    rows = _rows_on_hub(asked, where) if isinstance(where, HubSet) else _rows_of_file(asked, where)
    return Examples(name, tuple(rows), str(where), asked.classes)


def glue_place(name: str, task: str, split: str) -> Path | HubSet:
    """Return where the examples of a task are read from, as :func:`glue`.

    Raises:
        ParedError: no such task or split, or the folder of PARED_DATA has no such file.
    """
    if task not in GLUE:
        raise ParedError(f"labelled examples {name!r}: no GLUE task {task!r} here; {did_you_mean(task, GLUE)}")
    if split not in SPLITS:
        raise ParedError(f"labelled examples {name!r}: no split {split!r}; {did_you_mean(split, SPLITS)}")
    asked, part = GLUE[task], SPLITS[split]
    if data_folder() is not None:
        files = {"train": "train", "dev": asked.dev, "test": f"{asked.dev.replace('dev', 'test')}_labelled"}
        return data_file(f"glue/{asked.folder}/{files[part]}.tsv", f"labelled examples {name!r}")
    if part == "test":
        raise ParedError(f"labelled examples {name!r}: the Hub has no labels of the test part; use glue:{task}:dev, or "
                         "name a folder that has them in PARED_DATA")  # fmt: skip
    split_there = part if part == "train" else asked.dev.replace("dev", "validation")
    return HubSet("nyu-mll/glue", task.partition("-")[0], split_there)


def _rows_of_file(task: _Task, path: Path) -> Iterator[Example]:
    width = max(*task.texts, task.label) + 1
    for number, line in enumerate(read_lines(path), 1):
        cells = line.split("\t")
        if not line.strip() or (task.header and number == 1):
            continue
        if len(cells) < width and task.torn:
            log.warning("%s, row %d: %d columns; left out", path, number, len(cells))
            continue
        if len(cells) < width:
            raise ParedError(f"{path}, row {number}: expected at least {width} columns, got {len(cells)}")
        label = cells[task.label].strip()
        texts = tuple(cells[i].strip() for i in task.texts)
        if task.scores:
            yield Example(texts, _score(label, path, number))
        else:
            valid = task.classes or BINARY
            if label not in valid:
                raise ParedError(f"{path}, row {number}: expected a label of {', '.join(valid)}, got {label!r}")
            yield Example(texts, int(label) if label.isdigit() else label)


def _rows_on_hub(task: _Task, where: HubSet) -> Iterator[Example]:
    valid = task.classes or BINARY
    for which, row in where.rows(*task.fields, "label"):
        texts, label = tuple(row[field].strip() for field in task.fields), row["label"]
        if not task.scores and label not in range(len(valid)):
            raise ParedError(f"{which}: expected a label from 0 to {len(valid) - 1}, got {label!r}")
        yield Example(texts, task.classes[label] if task.classes else label)


def _score(label: str, path: Path, number: int) -> float:
    try:
        return float(label)
    except ValueError:
        raise ParedError(f"{path}, row {number}: expected a score, got {label!r}") from None
