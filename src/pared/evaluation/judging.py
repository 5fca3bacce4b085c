"""A model does a task, and what it wrote is judged: mathematics by its answer, code by running it."""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pared.environment import processors
from pared.errors import ParedError
from pared.evaluation import symbolic
from pared.evaluation.pass_at_k import mean_pass_at_k
from pared.evaluation.sandbox import Limits, run_program
from pared.evaluation.task import Row, Task, examples_of, rows_of
from pared.evaluation.tasks import task_of
from pared.names import called

if TYPE_CHECKING:  # which tasks there are is reported without them
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from pared.evaluation.batch_size import BatchSize
    from pared.evaluation.generation import Sampling

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Result:
    """How a model did on a task.

    Attributes:
        task: the name.
        metrics: from 0 to 1.
        errors: the standard error of each, of the mean over rows.
        rows: that were judged.
        shots: examples before each prompt.
        answers: what was written, by row, with its verdicts; of a group of tasks (MMLU) what each of them found.
        groups: by kind, such as ``level``, then by name: rows, metrics and errors of the rows that belong to it.
    """

    task: str
    metrics: dict[str, float]
    errors: dict[str, float]
    rows: int
    shots: int
    answers: tuple[dict[str, Any], ...]
    groups: dict[str, dict[str, dict[str, Any]]] = field(default_factory=dict)


def evaluate_task(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    name: str,
    limit: int | None = None,
    shots: int | None = None,
    sampling: "Sampling | None" = None,
    run_code: bool = False,
    ks: Sequence[int] = (1,),
    batch: "int | BatchSize" = 8,
    limits: Limits | None = None,
    on_prompt: Callable[[], None] = lambda: None,
) -> Result:
    """Let a model do a task and judge it.

    Args:
        model: a causal language model, dense or compressed.
        tokenizer: of the model.
        name: of the task.
        limit: the most rows, from the first; None means all.
        shots: examples before the prompt; None is the task's own.
        sampling: how tokens are chosen.
        run_code: whether programs the model writes may be run, in a sandbox that is no security boundary.
        ks: of pass@k, for code.
        batch: prompts at a time.
        limits: of programs.
        on_prompt: called for every prompt that is continued.

    Raises:
        ParedError: an unknown task, missing or malformed data, code to run without permission, or k above the samples.
    """
    from pared.evaluation.generation import Sampling, complete, room

    task, sampling = task_of(name), sampling or Sampling()
    require_permission(task, run_code)
    if task.runs and max(ks) > sampling.samples:
        raise ParedError(f"pass@{max(ks)} needs {max(ks)} samples of every problem, got {sampling.samples}: ask for "
                         "more samples and a temperature")  # fmt: skip
    if task.symbolic is not None and not symbolic.is_installed():
        log.warning("task %s: no %s, as its package is not installed: pip install math-verify", name, symbolic.METRIC)
    rows = rows_of(task, limit)
    shots, prompts = _prompts(task, rows, shots, model, tokenizer)
    tokens = _fitting(task, room(model, tokenizer, prompts))
    written = complete(model, tokenizer, prompts, tokens, task.stop, sampling, batch, on_prompt)
    verdicts = _verdicts(task, rows, written, limits)
    answers = tuple(
        {"row": index, "answers": texts, "verdicts": found}
        for index, (texts, found) in enumerate(zip(written, verdicts, strict=True))
    )
    return Result(name, *_means(task, verdicts, ks), len(rows), shots, answers, _groups(task, rows, verdicts, ks))


def _prompts(
    task: Task, rows: Sequence[Row], shots: int | None, model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase"
) -> tuple[int, list[str]]:
    """Return how many examples are shown and the prompts; of the task's own number fewer if the model has no room."""
    from pared.evaluation.generation import room

    wanted = task.shots if shots is None else shots
    for count in range(wanted, -1, -1):
        examples = examples_of(task, count)
        prompts = [examples + task.prompt(row) for row in rows]
        there = room(model, tokenizer, prompts)
        if shots is not None or there is None or there >= task.tokens or not count:
            break
    if count < wanted:
        log.warning("task %s: %d examples are shown, which is all this model has positions for, in place of %d",
                    task.name, count, wanted)  # fmt: skip
    return count, prompts


def _fitting(task: Task, there: int | None) -> int:
    """Return the new tokens of an answer: the task's own number, or as many as there is room for."""
    if there is None or there >= task.tokens or there < 1:
        return task.tokens
    log.warning("task %s: answers have %d tokens, which is all this model has positions for, in place of %d", task.name,
                there, task.tokens)  # fmt: skip
    return there


def require_permission(task: Task, run_code: bool) -> None:
    """Refuse to run programs without permission.

    Raises:
        ParedError: the task runs what the model writes.
    """
    if task.runs and not run_code:
        raise ParedError(
            f"task {task.name} runs programs that the model writes; allow it with "
            f"{called('allow_code_execution', 'True')}, best inside a virtual machine: the walls here are not a "
            "security boundary"
        )


def _verdicts(
    task: Task, rows: Sequence[Row], written: Sequence[Sequence[str]], limits: Limits | None
) -> list[list[dict[str, Any]]]:
    """Judge every answer of every row; programs run as many at a time as there are processors."""
    pairs = [(row, text) for row, texts in zip(rows, written, strict=True) for text in texts]
    with ThreadPoolExecutor(processors() if task.runs else 1) as pool:
        found = iter([*pool.map(lambda pair: _judged(task, pair[0], pair[1], limits), pairs)])
    if task.symbolic is not None and symbolic.is_installed():
        found = _verified(task.symbolic, pairs, found)
    return [[next(found) for _ in texts] for texts in written]


def _verified(
    right: Callable[[Row], str], pairs: Sequence[tuple[Row, str]], verdicts: Iterator[dict[str, Any]]
) -> Iterator[dict[str, Any]]:
    """Yield verdicts with that of math-verify among them."""
    with symbolic.Verifier() as verifier:
        for (row, text), verdict in zip(pairs, verdicts, strict=True):
            yield {**verdict, symbolic.METRIC: verifier.same(right(row), text)}


def _judged(task: Task, row: Row, text: str, limits: Limits | None) -> dict[str, Any]:
    if task.judge is not None:
        return dict(task.judge(row, text))
    assert task.program is not None
    ran = run_program(task.program(row, text), limits)
    return {"pass": ran.passed, "why": ran.why, "output": ran.output[-300:], "without": ran.without}


def _means(
    task: Task, verdicts: Sequence[Sequence[Mapping[str, Any]]], ks: Sequence[int]
) -> tuple[dict[str, float], dict[str, float]]:
    """Return every metric and its standard error over rows."""
    if task.runs:
        counts = [(len(own), sum(bool(one["pass"]) for one in own)) for own in verdicts]
        by_row = {f"pass@{k}": [mean_pass_at_k([count], k) for count in counts] for k in ks}
    else:
        by_row = {name: [sum(one[name] for one in own) / len(own) for own in verdicts] for name in verdicts[0][0]}
    means = {name: sum(values) / len(values) for name, values in by_row.items()}
    errors = {name: standard_error(values, means[name]) for name, values in by_row.items()}
    return means, errors


def _groups(
    task: Task, rows: Sequence[Row], verdicts: Sequence[Sequence[Mapping[str, Any]]], ks: Sequence[int]
) -> dict[str, dict[str, dict[str, Any]]]:
    """Return the metrics of the rows that belong together, by kind and name, in the order of names."""
    members: dict[str, dict[str, list[Sequence[Mapping[str, Any]]]]] = {}
    for row, own in zip(rows, verdicts, strict=True) if task.groups is not None else ():
        for kind, name in task.groups(row).items():  # type: ignore[misc]
            members.setdefault(kind, {}).setdefault(name, []).append(own)
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for kind, names in members.items():
        for name, those in sorted(names.items()):
            means, errors = _means(task, those, ks)
            found.setdefault(kind, {})[name] = {"rows": len(those), "metrics": means, "errors": errors}
    return found


def standard_error(values: Sequence[float], mean: float) -> float:
    """Return the standard error of the mean of a sample; 0 where there is one value."""
    if len(values) < 2:
        return 0.0
    variance = sum((value - mean) ** 2 for value in values) / (len(values) - 1)
    return float((variance / len(values)) ** 0.5)
