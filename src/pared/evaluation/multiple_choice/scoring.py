"""Questions with answers to choose from. Which answer is the likelier, and what counts, is the harness's business.

Rows of the files of ``PARED_DATA`` have prompts, answers and metrics of the folder ``definitions``, in the form of the
harness, whose ``--include_path`` takes the folder too. Where that names no folder, a task is the harness's own,
rows and all, from the Hub.
"""

import io
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, redirect_stdout
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

from pared.data.files import data_folder
from pared.data.hub import unreadable
from pared.errors import ParedError
from pared.evaluation.judging import Result

if TYPE_CHECKING:  # which tasks there are is reported without them
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from pared.evaluation.batch_size import BatchSize

DEFINITIONS = Path(__file__).parent / "definitions"
CHOICES = tuple(sorted(path.stem for path in DEFINITIONS.glob("*.yaml")))
# The harness's folders with its own definitions of these tasks; reading all it has takes half a minute.
FOLDERS = ("arc", "glue", "hellaswag", "lambada", "mathqa", "mmlu/default", "openbookqa", "piqa", "super_glue",
           "winogrande")  # fmt: skip
BATCH = 8
EXAMPLES_SEED = 1234  # the harness's own, of which examples are shown
RESAMPLED = 100  # times, where a standard error has no formula

Stage = Callable[[str, int, str], AbstractContextManager[Callable[[], None]]]


@dataclass(frozen=True)
class Prepared:
    """Tasks with their rows read and checked.

    Attributes:
        names: as asked for, in order.
        loaded: what the harness made of them.
        shots: examples before every question.
        limit: the most rows of a task, and of every subject of MMLU; None means all.
    """

    names: tuple[str, ...]
    loaded: Any
    shots: int
    limit: int | None


def prepare(names: Sequence[str], shots: int | None = None, limit: int | None = None) -> Prepared:
    """Read the rows of tasks, so that whatever is wrong with them is known before a model is loaded.

    Args:
        names: of tasks, of ``CHOICES``.
        shots: examples before every question; None is the task's own, which is 0 for all that are here.
        limit: the most rows of a task, from the first.

    Raises:
        ParedError: missing or malformed data (names the file and the row), examples of a task that has none apart from
            what is measured, a limit that leaves nothing, or lm-evaluation-harness is not installed.
    """
    try:
        from lm_eval import tasks
    except ImportError:
        raise ParedError(
            "multiple choice is scored by lm-evaluation-harness; install it with: pip install 'lm-eval[hf]'"
        ) from None
    if limit is not None and limit < 1:
        raise ParedError(f"tasks {', '.join(names)}: a limit of {limit} rows leaves nothing to measure")
    if shots is not None and shots < 0:
        raise ParedError(f"tasks {', '.join(names)}: cannot show {shots} examples")
    with _quietly():
        if data_folder() is not None:
            loaded = tasks.TaskManager(include_path=DEFINITIONS, include_defaults=False).load(list(names))
        else:
            folders = [Path(tasks.__file__).parent / folder for folder in FOLDERS]
            loaded = _from_hub(tasks.TaskManager(include_path=folders, include_defaults=False), names, limit)
    for name, task in loaded["tasks"].items():
        apart = task.config.fewshot_split or task.config.training_split
        if shots and apart is None:
            raise ParedError(f"task {name} has no examples to show apart from what it is evaluated on; use 0 shots")
        there = len(task.dataset[apart]) if shots else 0
        spare = task.config.fewshot_split is None  # the harness draws one more, in case one is the question itself
        if shots and there < shots + spare:
            raise ParedError(f"task {name} has {there} examples to show, got a request for {shots}")
        task.set_config(key="num_fewshot", value=shots or 0)
    return Prepared(tuple(names), loaded, shots or 0, limit)


def evaluate_choices(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    tasks: Prepared,
    stage: Stage,
    batch: "int | BatchSize" = BATCH,
    note: Callable[[str], None] = lambda _: None,
) -> list[Result]:
    """Let a model choose, and count.

    Args:
        model: a causal language model, dense or compressed.
        tokenizer: of the model.
        tasks: what to do.
        stage: opens a stage of progress, from its name, its length and the unit of that.
        batch: sequences at a time.
        note: is given what a reader of the result must know.

    Returns:
        By task: the harness's metrics with its standard errors; for MMLU also by subject.
    """
    from lm_eval.evaluator import evaluate

    from pared.evaluation.batch_size import BatchSize

    for task in tasks.loaded["tasks"].values():
        task.set_fewshot_seed(EXAMPLES_SEED)
    with _quietly():
        scorer = _scorer(model, tokenizer, BatchSize.of(batch), stage)
        found = evaluate(scorer, tasks.loaded, limit=tasks.limit, bootstrap_iters=RESAMPLED)
    if scorer.cut:
        note(f"{scorer.cut} questions with their examples are longer than the {scorer.max_length} tokens this model "
             "takes; their beginnings were cut off")  # fmt: skip
    return [_result(name, tasks, found) for name in tasks.names]


def _from_hub(manager: Any, names: Sequence[str], limit: int | None) -> Any:
    """Return the harness's own tasks with their rows, each of which can be asked."""
    for name in names:
        if name not in manager.all_tasks:
            raise ParedError(f"lm-evaluation-harness {version('lm_eval')} has no task {name}, 0.4.13 has; install "
                             "that, or name a folder of local copies in PARED_DATA")  # fmt: skip
    try:
        loaded = manager.load(list(names))
    except Exception as error:  # datasets and huggingface_hub raise many kinds
        raise unreadable(f"the data of {', '.join(names)} on the Hub", error) from None
    for name, task in loaded["tasks"].items():
        _require_questions(name, task, limit)
    return loaded


def _require_questions(name: str, task: Any, limit: int | None) -> None:
    """Refuse a row that the definition of its task makes no question of."""
    asked = [task.doc_to_text, task.doc_to_target]
    if task.config.doc_to_choice is not None:
        asked.append(task.doc_to_choice)
    for number, row in enumerate(islice(task.eval_docs, limit), 1):
        try:
            for part in asked:
                part(row)
        except Exception as error:
            why = f"{type(error).__name__}: {error}"
            raise ParedError(f"task {name}, row {number} of Hub data set {task.DATASET_PATH}: expected a question "
                             f"with its answers, got {dict(row)!s:.300} ({why})") from None  # fmt: skip


def _scorer(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", size: "BatchSize", stage: Stage) -> Any:
    """Return the harness's scorer over a loaded model, which reports to our progress."""
    from lm_eval.models.huggingface import HFLM

    class Scorer(HFLM):
        cut = 0

        def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> Any:  # noqa: ARG002 - the harness's
            return super().loglikelihood(requests, disable_tqdm=True)

        def _loglikelihood_tokens(self, requests: Any, **more: Any) -> Any:
            distinct = {(*context, *answer[:-1]) for _, context, answer in requests}  # the model sees each once
            self.cut += sum(len(sequence) > self.max_length for sequence in distinct)
            size.fit(model, min(self.max_length, max(map(len, distinct), default=1)))
            return size.attempt(lambda rows: self._scored(rows, requests, len(distinct), more))

        def _scored(self, rows: int, requests: Any, distinct: int, more: Any) -> Any:
            self.batch_size_per_gpu = rows  # the longest sequences come first: what these take is enough for all
            with stage("score answers", distinct, "sequence") as self.advance:
                return super()._loglikelihood_tokens(requests, **more)

        def _model_call(self, inps: Any, **more: Any) -> Any:
            for _ in inps:
                self.advance()
            return super()._model_call(inps, **more)

    return Scorer(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=size.now)


@contextmanager
def _quietly() -> Iterator[None]:
    """Keep away the harness's own bars, prints and warnings, and the processes it would fork to resample a mean."""
    from tqdm import tqdm

    log = logging.getLogger("lm_eval")
    level = log.level
    log.setLevel(logging.ERROR)  # what it warns of here: metadata, and sequences cut, which are counted
    silent = partial(tqdm, disable=True)
    alone = patch.dict(os.environ, {"DISABLE_MULTIPROC": "1"})
    with alone, patch("tqdm.tqdm", silent), patch("lm_eval.api.task.tqdm", silent), redirect_stdout(io.StringIO()):
        try:
            yield
        finally:
            log.setLevel(level)


def _result(name: str, tasks: Prepared, found: Any) -> Result:
    """Return what the harness found of a task, or of a group of tasks and of each of them."""
    members = _members(name, tasks.loaded["group_map"])
    metrics, errors = _metrics(found["groups" if members else "results"][name])
    by_member = {member.removeprefix(f"{name}::"): _metrics(found["results"][member]) for member in members}
    parts = tuple(
        {"task": part, "metrics": own[0], "errors": own[1], "by_row": _by_row(found["samples"][member])}
        for member, (part, own) in zip(members, by_member.items(), strict=True)
    )
    rows = sum(len(found["samples"][one]) for one in members or (name,))
    return Result(name, metrics, errors, rows, tasks.shots, parts or _answers(name, tasks, found["samples"][name]))


def _members(name: str, groups: Mapping[str, Sequence[str]]) -> list[str]:
    """Return the tasks of a group, and of the groups in it; none of what is no group."""
    children = groups.get(name, ())
    return [member for child in children for member in (_members(child, groups) if child in groups else [child])]


def _metrics(own: Any) -> tuple[dict[str, float], dict[str, float]]:
    """Return the metrics of a task by name and their standard errors, from the harness's ``metric,filter``."""
    values = {key.partition(",")[0]: value for key, value in own.items() if "," in key}
    names = [name for name in values if not name.endswith("_stderr")]
    errors = {name: values[f"{name}_stderr"] for name in names}
    return {name: float(values[name]) for name in names}, {
        name: float(error) if isinstance(error, (int, float)) else 0.0  # of one row the harness says N/A
        for name, error in errors.items()
    }


def _answers(name: str, tasks: Prepared, samples: Sequence[Any]) -> tuple[dict[str, Any], ...]:
    """Return what is kept of every row."""
    task = tasks.loaded["tasks"][name]
    # Where beginnings differ and the end does not, the text of a question is, to the harness, which beginning is right.
    right = task.doc_to_text if task.multiple_input else task.doc_to_target
    return tuple(_answer(sample, right(sample["doc"])) for sample in samples)


def _by_row(samples: Sequence[Any]) -> dict[str, list[float]]:
    """Return every metric of a task of a group by row."""
    counted = [_answer(sample, None)["verdicts"] for sample in sorted(samples, key=lambda sample: sample["doc_id"])]
    return {name: [one[name] for one in counted] for name in (counted[0] if counted else ())}


def _answer(sample: Any, right: Any) -> dict[str, Any]:
    """Return what is kept of a row: which answer is right, how likely each was, in nats, and what that counted."""
    likely = [answer[0] for answer in sample["filtered_resps"]]
    counted = {name: float(sample[name]) for name in sample["metrics"] if isinstance(sample[name], (int, float))}
    return {"row": sample["doc_id"], "right": right, "log_likelihoods": likely, "verdicts": counted}
