"""Tasks in which a model writes and what it wrote is judged: mathematics by its answer, code by running it."""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pared.data.data_sets import GSM8K_TEST, GSM8K_TRAIN, MATH500, MBPP, DataSet
from pared.data.hub import HubSet
from pared.errors import ParedError
from pared.evaluation.answers import boxed, last_number, marked_number, same_expression, same_number
from pared.evaluation.pass_at_k import mean_pass_at_k
from pared.evaluation.sandbox import Limits, run_program
from pared.names import called, require_known

if TYPE_CHECKING:  # which tasks there are is reported without them
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from pared.evaluation.generation import Sampling

log = logging.getLogger(__name__)

Row = Mapping[str, Any]
Verdict = Mapping[str, bool]


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
        program: from a row and an answer to the program that passes if the answer is right; none but for code.
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
    program: Callable[[Row, str], str] | None = None
    shots_data: DataSet | None = None
    chosen: Callable[[Row], bool] = field(default=lambda row: True)  # noqa: ARG005
    shown: Callable[[Row], bool] = field(default=lambda row: True)  # noqa: ARG005
    shots: int = 0

    @property
    def runs(self) -> bool:
        """Whether judging runs what the model wrote."""
        return self.program is not None


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
    """

    task: str
    metrics: dict[str, float]
    errors: dict[str, float]
    rows: int
    shots: int
    answers: tuple[dict[str, Any], ...]


def evaluate_task(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    name: str,
    limit: int | None = None,
    shots: int | None = None,
    sampling: "Sampling | None" = None,
    run_code: bool = False,
    ks: Sequence[int] = (1,),
    batch: int = 8,
    limits: Limits | None = None,
    on_batch: Callable[[], None] = lambda: None,
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
        on_batch: called after every batch.

    Raises:
        ParedError: an unknown task, missing or malformed data, code to run without permission, or k above the samples.
    """
    from pared.evaluation.generation import Sampling, complete, room

    task, sampling = task_of(name), sampling or Sampling()
    require_permission(task, run_code)
    if task.runs and max(ks) > sampling.samples:
        raise ParedError(f"pass@{max(ks)} needs {max(ks)} samples of every problem, got {sampling.samples}: ask for "
                         "more samples and a temperature")  # fmt: skip
    rows = rows_of(task, limit)
    shots, prompts = _prompts(task, rows, shots, model, tokenizer)
    tokens = _fitting(task, room(model, tokenizer, prompts))
    written = complete(model, tokenizer, prompts, tokens, task.stop, sampling, batch, on_batch)
    verdicts = [[_judged(task, row, text, limits) for text in texts] for row, texts in zip(rows, written, strict=True)]
    answers = tuple(
        {"row": index, "answers": texts, "verdicts": found}
        for index, (texts, found) in enumerate(zip(written, verdicts, strict=True))
    )
    return Result(name, *_means(task, verdicts, ks), len(rows), shots, answers)


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


def task_of(name: str) -> Task:
    """Return a task by name.

    Raises:
        ParedError: there is none.
    """
    require_known("task", name, TASKS)
    return TASKS[name]


def require_permission(task: Task, run_code: bool) -> None:
    """Refuse to run programs without permission.

    Raises:
        ParedError: the task runs what the model writes.
    """
    if task.runs and not run_code:
        raise ParedError(
            f"task {task.name} runs programs that the model writes; allow it with "
            f"{called('allow_code_execution', 'True')}, best inside a container: the limits here are not a security "
            "boundary"
        )


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


def standard_error(values: Sequence[float], mean: float) -> float:
    """Return the standard error of the mean of a sample; 0 where there is one value."""
    if len(values) < 2:
        return 0.0
    variance = sum((value - mean) ** 2 for value in values) / (len(values) - 1)
    return float((variance / len(values)) ** 0.5)


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


# The tasks.


def _question(row: Row) -> str:
    return f"Question: {row.get('question', row.get('context'))}\nAnswer:"


def _svamp(row: Row) -> Row:
    """Return a row of the Hub as the file has it: the story and its question are one text."""
    return {"context": f"{row['Body']} {row['Question']}", "answer": row["Answer"]}


def _gsm8k(row: Row, text: str) -> Verdict:
    right = marked_number(row["answer"])
    return {
        "exact_match": same_number(marked_number(text), right),
        "last_number": same_number(last_number(text), right),
    }


def _humaneval(row: Row, text: str) -> str:
    return f"{row['prompt']}{text}\n{row['test']}\ncheck({row['entry_point']})\n"


def _mbpp(row: Row, text: str) -> str:
    return "\n".join([row.get("test_setup_code", ""), text, *row["test_list"], ""])


def _mbpp_prompt(row: Row) -> str:
    tests = "\n".join(row["test_list"])
    return (
        f"You are an expert Python programmer, and here is your task: {row['text']} Your code should pass these tests:"
        f"\n\n{tests}\n[BEGIN]\n"
    )


TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task(
            name="gsm8k",
            data=GSM8K_TEST,
            fields={"question": str, "answer": str},
            right=lambda row: marked_number(row["answer"]),
            prompt=_question,
            answer=lambda row: f" {row['answer']}",
            stop=("Question:", "\n\n\n"),
            tokens=256,
            judge=_gsm8k,
            shots_data=GSM8K_TRAIN,
            shots=5,
        ),
        Task(
            name="svamp",
            data=DataSet(
                "math/svamp_test.jsonl",
                HubSet("ChilleD/SVAMP", split="test"),
                ("Body", "Question", "Answer"),
                _svamp,
            ),
            fields={"context": str, "answer": (str, int, float)},
            right=lambda row: last_number(str(row["answer"])),
            prompt=_question,
            answer=lambda row: f" {row['answer']}",
            stop=("Question:", "\n\n\n"),
            tokens=256,
            judge=lambda row, text: {"last_number": same_number(last_number(text), last_number(str(row["answer"])))},
        ),
        Task(
            name="math500",
            data=MATH500,
            fields={"problem": str, "answer": str},
            prompt=lambda row: f"Problem:\n{row['problem']}\n\nSolution:",
            answer=lambda row: f" {row['solution']}",
            stop=("Problem:",),
            tokens=512,
            judge=lambda row, text: {"equivalent": same_expression(boxed(text), row["answer"])},
        ),
        Task(
            name="humaneval",
            data=DataSet("code/HumanEval.jsonl", HubSet("openai/openai_humaneval", split="test")),
            fields={"prompt": str, "test": str, "entry_point": str},
            prompt=lambda row: str(row["prompt"]),
            answer=lambda row: str(row["canonical_solution"]),
            stop=("\nclass ", "\ndef ", "\n#", "\nif ", "\nprint(", "\n@"),
            tokens=512,
            program=_humaneval,
        ),
        Task(
            name="mbpp",
            data=MBPP,
            fields={"text": str, "code": str, "task_id": int, "test_list": list},
            prompt=_mbpp_prompt,
            answer=lambda row: f"{row['code']}\n[DONE]",
            stop=("[DONE]", "\nYou are an expert"),
            tokens=512,
            program=_mbpp,
            chosen=lambda row: 11 <= row["task_id"] <= 510,  # the authors' test part
            shown=lambda row: 2 <= row["task_id"] <= 4,  # and the examples they show
            shots=3,
        ),
    )
}
