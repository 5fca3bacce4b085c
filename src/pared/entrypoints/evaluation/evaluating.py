"""The measures of ``pared eval`` on one model."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import cached_property
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pared.checkpoint import load
from pared.data.encoding import cut_examples
from pared.data.evaluated import evaluation_windows
from pared.data.files import data_folder
from pared.data.labelled import find_examples
from pared.data.lengths import Length
from pared.data.overlap import overlap
from pared.data.texts import find_text
from pared.data.windows import Windows
from pared.entrypoints.evaluation.kept_results import Kept
from pared.environment import device_of, versions
from pared.errors import ParedError
from pared.evaluation import Result, Sampling, classify, evaluate_task, task_of
from pared.evaluation import perplexity as measure
from pared.evaluation.batch_size import BatchSize
from pared.evaluation.classification import BATCH
from pared.evaluation.generation import require_possible
from pared.evaluation.judging import require_permission
from pared.evaluation.multiple_choice import CHOICES, evaluate_choices, prepare
from pared.evaluation.protocols import cut_by, protocol_of
from pared.evaluation.task import examples_of, rows_of
from pared.evaluation.vision_sets import VISION_SETS, find_questions
from pared.evaluation.vqa import BATCH as BATCH_OF_IMAGES
from pared.evaluation.vqa import answer_questions, processor_of
from pared.io.files import path_of
from pared.io.record import MANIFEST
from pared.models.architecture import is_causal
from pared.models.loaded import LoadedModel
from pared.models.source import ModelSource, find_model
from pared.names import called
from pared.progress import Progress
from pared.report.table import WORTH_SAYING
from pared.schema.evaluate import READS, EvaluationConfig
from pared.schema.manifest import Manifest
from pared.schema.recipe import Evaluation

TOGETHER = 8  # prompts, or sequences
LABELLED_LENGTH = 1024  # tokens of a labelled example at most
PERPLEXITY = "perplexity"  # as results of it are kept beside those of tasks


def learned_share(source: ModelSource | LoadedModel, measured: Windows) -> float:
    """Return the share of what is measured on that a folder says it was calibrated or trained on."""
    folder = path_of(source.location)
    if not source.location or not (folder / MANIFEST).is_file():
        return 0.0
    manifest = Manifest.read(folder)
    learned = [*([manifest.calibration] if manifest.calibration else []),
               *(one for entry in manifest.training for one in entry.data)]  # fmt: skip
    return overlap(measured, learned)


class Evaluating:
    """The measures, each in a method of its name."""

    def __init__(
        self,
        model: str | LoadedModel,
        config: EvaluationConfig,
        progress: Progress,
        tell: Callable[[str], object],
        kept: Kept,
    ) -> None:
        self.source: ModelSource | LoadedModel = find_model(model, config.dtype) if isinstance(model, str) else model
        self.model, self.config, self.progress, self.tell, self.kept = self.source.name, config, progress, tell, kept
        self.device = device_of(config.device)

    @cached_property
    def loaded(self) -> PreTrainedModel:
        """The model, where it runs."""
        found = self.source.load(self.config.dtype) if isinstance(self.source, LoadedModel) else load(
            self.model, self.config.dtype)  # fmt: skip
        return found.to(self.device)

    def perplexity(self) -> dict[str, Any]:
        """Measure perplexity on a text."""
        if self.config.protocol is not None:
            return self._perplexity_by_protocol()
        config, text = self.config, str(self.config.perplexity)
        length = {} if config.length is None else {"length": config.length}
        named = {"text": text, "windows": config.windows, "bos": config.bos or "none", **length}
        asked = Evaluation.of(named, "options: evaluation")
        tokenizer, stride = self.source.tokenizer(), config.stride
        pieces = evaluation_windows(asked, tokenizer, self.source.config(), stride=stride)
        share = learned_share(self.source, pieces)
        loaded = self.loaded
        with self.progress.stage(f"perplexity on {text}", len(pieces.tokens), "window") as advance:
            result = measure(loaded, tokenizer, pieces, asked.bos, advance, fresh=stride)
        stand_in = "; a stand-in" if pieces.stand_in else ""
        seen = f", {share:.0%} of which was calibrated or trained on" if share >= WORTH_SAYING else ""
        self.tell(
            f"perplexity {result.value:.4f} on {text}{stand_in}{seen}: {len(pieces.tokens)} windows of "
            f"{pieces.tokens.shape[1]} tokens{f' every {stride}' if stride else ''}, {result.predicted:,} predicted, "
            f"bos {asked.bos}, {loaded.dtype}"
        )
        found = {"dtype": str(loaded.dtype), "perplexity": result.value, "nats": result.nats, "stride": stride}
        found |= {"predicted": result.predicted, **result.windows, "learned_from": share}
        return {**found, "by_window": [list(one) for one in result.by_window]}

    def _perplexity_by_protocol(self) -> dict[str, Any]:
        """Measure perplexity as a paper's code does."""
        text, name = str(self.config.perplexity), str(self.config.protocol)
        tokenizer, protocol = self.source.tokenizer(), protocol_of(name)
        whole = find_text(text, evaluation=True, tokenizer=tokenizer)
        pieces = cut_by(protocol, whole, tokenizer, self.source.config())
        for deviation in pieces.deviations:
            self.progress.note(f"not as {name} measures: {deviation}")
        loaded, tokens = self.loaded, pieces.windows.tokens
        with self.progress.stage(f"perplexity on {text}", len(tokens), "window") as advance:
            result = measure(loaded, tokenizer, pieces.windows, "none", advance, pieces.averaging)
        self.tell(
            f"perplexity {result.value:.4f} on {text} as {name} measures ({protocol.source}): {len(tokens)} windows of "
            f"{tokens.shape[1]} tokens, mean over {pieces.averaging}s, {result.predicted:,} predicted, {loaded.dtype}"
        )
        found = {"dtype": str(loaded.dtype), "perplexity": result.value, "nats": result.nats, "protocol": name}
        found |= {"predicted": result.predicted, "deviations": pieces.deviations, **result.windows}
        return {**found, "by_window": [list(one) for one in result.by_window]}

    def examples(self) -> dict[str, Any]:
        """Let an encoder label examples."""
        name, config = str(self.config.examples), self.source.config()
        if is_causal(config.architectures or []):
            raise ParedError(
                f"{self.model} is a language model; labelled examples are for encoders with a head for classes"
            )
        most = Length.given(self.config.length, LABELLED_LENGTH).within(config, "labelled examples")
        pieces = cut_examples(find_examples(name), self.source.tokenizer(), config, most.tokens, self.config.windows)
        loaded = self.loaded
        with (
            self._rows_at_a_time(BATCH) as size,
            self.progress.stage(f"label {name}", len(pieces.tokens), "example") as advance,
        ):
            score = classify(loaded, pieces, advance, size)
        self.tell(
            f"{_figures(score.metrics)} on {name}: {score.examples:,} examples, {score.labels:,} labels, {loaded.dtype}"
        )
        found = {"dtype": str(loaded.dtype), **score.metrics, "examples": score.examples, "labels": score.labels}
        return {**found, **pieces.describe()}

    def fine_tune(self) -> dict[str, Any]:
        """Train an encoder for every task, and score it; what is done is kept."""
        from pared.entrypoints.evaluation import fine_tune_encoder as encoders  # the Trainer is seconds to import

        config, names = self.config, list(self.config.fine_tune or ())
        how = {"epochs": config.epochs, "learning_rate": config.learning_rate, "length": config.length,
               "examples": config.limit}  # fmt: skip
        given: dict[str, Any] = {name: value for name, value in how.items() if value is not None}
        chosen = encoders.FineTuning(**given)
        encoders.require_encoder(self.model)
        chosen = encoders.within(chosen, self.source.config())
        parts = {name: encoders.examples_of(name) for name in names}  # a missing file, before the first is trained
        self.kept.begin({**self._identity(), **asdict(chosen), "device": str(self.device)})
        for name, part in parts.items():
            if self.kept.has(name):
                continue
            steps = encoders.steps_of(len(part.train.rows), chosen)
            with self.progress.stage(f"fine-tune {name}", steps, "step") as advance:
                score = encoders.fine_tuned_score(self.model, part, chosen, self.device, advance)
            self.tell(f"{name}: {_figures(score.metrics)}; {score.examples:,} examples after {chosen.epochs:g} epochs")
            self.kept.add(name, {"task": name, **asdict(chosen), **asdict(score)})
        return {"tasks": self.kept.results(names)}

    def vqa(self) -> dict[str, Any]:
        """Ask a model about images."""
        name = str(self.config.vqa)
        questions, processor = find_questions(name, self.config.limit), processor_of(self.model)
        loaded = self.loaded
        with (
            self._rows_at_a_time(BATCH_OF_IMAGES) as size,
            self.progress.stage(f"answer {path_of(name).name}", len(questions), "question") as advance,
        ):
            result = answer_questions(loaded, processor, questions, size, advance)
        named = name in VISION_SETS
        result = replace(result, task=name if named else result.task)
        self._tell_result(result, loaded.dtype)
        origin = VISION_SETS[name].data.origin(name) if named else str(path_of(name))
        return {"dtype": str(loaded.dtype), "questions": origin, **asdict(result)}

    def perplexity_and_tasks(self) -> dict[str, Any]:
        """Measure perplexity, then let the model do tasks; what is done is kept."""
        text = {name: getattr(self.config, name) for name in ("perplexity", "protocol", *READS["perplexity"])}
        found = self.tasks({"text": {name: value for name, value in text.items() if name != "against"}})
        (on,) = self.kept.results([PERPLEXITY])
        return {**found, "perplexity": on["perplexity"], "perplexity_on": on}

    def tasks(self, also: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Let a model do tasks: those in which it chooses, then those in which it writes; what is done is kept.

        Args:
            also: how perplexity is measured before them.
        """
        config, names = self.config, list(self.config.tasks or ())
        sampling = Sampling(
            temperature=config.temperature or 0.0, samples=1 if config.samples is None else config.samples
        )
        chosen, counts = self._tasks_of(names, sampling)
        asked = {"limit": config.limit, "shots": config.shots, **asdict(sampling), "dtype": config.dtype}
        settings = {**self._identity(), **asked, "device": str(self.device)}
        self.kept.begin({**settings, **(also or {})})
        prepared = [prepare([name], config.shots, config.limit) for name in chosen if not self.kept.has(name)]
        if also and not self.kept.has(PERPLEXITY):
            self.kept.add(PERPLEXITY, self.perplexity())
        tokenizer, loaded = self.source.tokenizer(), self.loaded
        for part in prepared:
            with self._rows_at_a_time(TOGETHER) as size:
                stage, note = self.progress.stage, self.progress.note
                (result,) = evaluate_choices(loaded, tokenizer, part, stage, size, note)
            self._tell_result(result, loaded.dtype)
            self.kept.add(result.task, asdict(result))
        for name, count in counts.items():
            if not self.kept.has(name):
                self.kept.add(name, asdict(self._written_task(loaded, tokenizer, name, count, sampling)))
        return {**settings, "dtype": str(loaded.dtype), "tasks": self.kept.results([*chosen, *counts])}

    def _tasks_of(self, names: list[str], sampling: Sampling) -> tuple[list[str], dict[str, int]]:
        """Return the tasks in which a model chooses, and with their rows those in which it writes.

        Raises:
            ParedError: whatever is wrong with any, before the model is loaded.
        """
        if not is_causal(self.source.config().architectures or []):
            raise ParedError(f"{self.model} is not a causal language model, which these tasks need; see "
                             f"{called('fine_tune')}")  # fmt: skip
        chosen = [name for name in names if name in CHOICES]
        if chosen and sampling != Sampling() and len(chosen) == len(names):
            raise ParedError(f"{called('samples')} and {called('temperature')} are of answers that are written; "
                             f"{', '.join(chosen)} choose")  # fmt: skip
        written = [task_of(name) for name in names if name not in CHOICES]
        for task in written:
            require_permission(task, self.config.allow_code_execution)
            require_possible(sampling, task.tokens)
        counts: dict[str, int] = {}
        for task in written:
            counts[task.name] = len(rows_of(task, self.config.limit))
            examples_of(task, task.shots if self.config.shots is None else self.config.shots)
        return chosen, counts

    def _written_task(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str, count: int, sampling: Sampling
    ) -> Result:
        ks = tuple(k for k in (1, 10, 100) if k <= sampling.samples)
        limit, shots, run_code = self.config.limit, self.config.shots, self.config.allow_code_execution
        with self._rows_at_a_time(TOGETHER) as size, self.progress.stage(name, count, "prompt") as advance:
            result = evaluate_task(
                model, tokenizer, name, limit, shots, sampling, run_code, ks, size, on_prompt=advance
            )
        self._tell_result(result, model.dtype)
        walls = {wall for row in result.answers for one in row["verdicts"] for wall in one.get("without", ())}
        if walls:
            self.progress.note(f"this machine has no {', '.join(sorted(walls))}; programs ran without")
        return result

    @contextmanager
    def _rows_at_a_time(self, usual: int) -> Iterator[BatchSize]:
        """Give the batch size that is asked for, or the usual; one that was found is told when the work is done."""
        asked = self.config.batch_size
        size = BatchSize(usual if asked is None else asked)
        yield size
        if size.is_found:
            self.progress.note(f"{size.now} rows at a time")

    def _tell_result(self, result: Result, dtype: torch.dtype) -> None:
        figures = ", ".join(f"{metric} {value:.4f} ± {result.errors[metric]:.4f}"
                            for metric, value in result.metrics.items())  # fmt: skip
        self.tell(f"{result.task}: {figures}; {result.rows:,} rows, {result.shots} shots, {dtype}")
        for kind, names in result.groups.items():
            by_name = ", ".join(f"{name} {_figures(own['metrics'])} ({own['rows']:,})" for name, own in names.items())
            self.tell(f"{result.task} by {kind}: {by_name}")

    def _identity(self) -> dict[str, Any]:
        """Return what distinguishes this model, these data and these programs from others."""
        data = str(data_folder() or "the Hub")
        return {"model": self.model, "digest": self.source.digest(), "data": data, **versions()}


def _figures(metrics: dict[str, float]) -> str:
    return ", ".join(f"{metric} {value:.4f}" for metric, value in metrics.items())
