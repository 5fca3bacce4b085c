"""What a task is in which a model writes, and the rows it is made of."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from pared.data.data_sets import DataSet
from pared.errors import ParedError
from pared.evaluation.sandbox import Program

Row = Mapping[str, Any]
Verdict = Mapping[str, bool]
Groups = Mapping[str, str]


@dataclass(frozen=True)
class Task:
    """A task for generation.

    Attributes:
        name: what users call it.
        data: what it is measured on.
        fields: a row must have, and of what type.
        right: of a row, the answer that is judged against; None where the row's own says none. None needs no look.
        prompt: of a row, without its answer.
        answer: of a row, as it stands behind the prompt in an example.
        stop: strings that end an answer.
        tokens: the most of an answer.
        judge: from a row and an answer to a verdict by metric; none for code.
        program: from a row and an answer to the program and the tests that it passes if it is right; none but for code.
        symbolic: from a row to the right answer as math-verify reads it, which then judges too; none for what is no
            mathematics.
        groups: of a row, what it belongs to by kind, such as its subject and its level; metrics are told of each.
        shots_data: where examples are from, ``data`` itself if not given.
        chosen: rows of the data that are evaluated on.
        shown: rows that examples are taken from, in their order.
        shots: examples before the prompt, if nothing is asked for.
    """

    name: str
    data: DataSet
    fields: Mapping[str, type | tuple[type, ...]]
    prompt: Callable[[Row], str]
    answer: Callable[[Row], str]
    stop: tuple[str, ...]
    tokens: int
    judge: Callable[[Row, str], Verdict] | None = None
    right: Callable[[Row], object] | None = None
    program: Callable[[Row, str], Program] | None = None
    symbolic: Callable[[Row], str] | None = None
    groups: Callable[[Row], Groups] | None = None
    shots_data: DataSet | None = None
    chosen: Callable[[Row], bool] = field(default=lambda row: True)  # noqa: ARG005
    shown: Callable[[Row], bool] = field(default=lambda row: True)  # noqa: ARG005
    shots: int = 0

    @property
    def runs(self) -> bool:
        """Whether judging runs what the model wrote."""
        return self.program is not None


def rows_of(task: Task, limit: int | None = None) -> list[Row]:
    """Return the rows a task is evaluated on.

    Raises:
        ParedError: the data cannot be read, or a row is not one of the task's; names file and row.
    """
    if limit is not None and limit < 1:
        raise ParedError(f"task {task.name}: a limit of {limit} rows leaves nothing to measure")
    rows = [row for row in _read(task, task.data) if task.chosen(row)][:limit]
    if not rows:
        raise ParedError(f"task {task.name}: {task.data.origin(f'task {task.name}')} has no rows to evaluate on")
    return rows


def examples_of(task: Task, shots: int) -> str:
    """Return the text of so many solved examples, which are never among the rows evaluated on.

    Raises:
        ParedError: there are fewer.
    """
    if not shots:
        return ""
    if task.shots_data is None and not task.shots:
        raise ParedError(f"task {task.name} has no examples to show apart from what it is evaluated on; use 0 shots")
    rows = [row for row in _read(task, task.shots_data or task.data) if task.shown(row)][:shots]
    if len(rows) < shots:
        raise ParedError(f"task {task.name} has {len(rows)} examples to show, got a request for {shots}")
    return "".join(f"{task.prompt(row)}{task.answer(row)}\n\n" for row in rows)


def _read(task: Task, data: DataSet) -> Iterator[Row]:
    for which, row in data.rows(f"task {task.name}"):
        missing = [name for name in task.fields if not isinstance(row, dict) or name not in row]
        if missing:
            found = sorted(row) if isinstance(row, dict) else type(row).__name__
            raise ParedError(f"{which}: expected {', '.join(task.fields)}; {missing[0]} is missing, got {found}")
        for name, kind in task.fields.items():
            if not isinstance(row[name], kind):
                raise ParedError(f"{which}: expected {name} to be {_kinds(kind)}, got {row[name]!r}")
        if task.right is not None and task.right(row) is None:
            raise ParedError(f"{which}: answer {str(row['answer'])[-60:]!r} says no number to judge by")
        yield row


def _kinds(kind: type | tuple[type, ...]) -> str:
    return " or ".join(one.__name__ for one in (kind if isinstance(kind, tuple) else (kind,)))
