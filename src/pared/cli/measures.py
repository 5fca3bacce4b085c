"""What ``pared eval`` measures, and how it tells."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pared.checkpoint import load
from pared.cli.console import ConsoleProgress, err, out
from pared.data.encoding import cut_examples
from pared.data.evaluated import evaluation_windows
from pared.data.files import data_folder
from pared.data.labelled import find_examples
from pared.data.lengths import Length
from pared.data.overlap import overlap
from pared.data.texts import find_text
from pared.data.windows import Windows
from pared.entrypoints.kept_results import Kept
from pared.environment import versions
from pared.errors import ParedError
from pared.evaluation import TASKS, Result, Sampling, classify, evaluate_task, task_of
from pared.evaluation import perplexity as measure
from pared.evaluation.classification import BATCH, batches
from pared.evaluation.generation import require_possible
from pared.evaluation.multiple_choice import CHOICES, evaluate_choices, prepare
from pared.evaluation.protocols import cut_by, protocol_of
from pared.evaluation.tasks import examples_of, require_permission, rows_of
from pared.evaluation.vqa import BATCH as BATCH_OF_IMAGES
from pared.evaluation.vqa import answer_questions, processor_of, questions_of
from pared.io.record import MANIFEST
from pared.models.architecture import is_causal
from pared.models.source import ModelSource, find_model
from pared.names import require_known
from pared.report.table import WORTH_SAYING
from pared.schema.manifest import Manifest
from pared.schema.recipe import Recipe

if TYPE_CHECKING:
    from pared.entrypoints.fine_tune_encoder import FineTuning

WRITTEN_TOGETHER = 8  # prompts
LABELLED_LENGTH = 1024  # tokens of a labelled example at most


def perplexity_on(
    model: str,
    text: str,
    length: int | None,
    windows: int | None,
    stride: int | None,
    bos: str,
    dtype: str,
    place: torch.device,
) -> dict[str, Any]:
    """Measure perplexity on a text."""
    named = {"text": text, "windows": windows, "bos": bos, **({} if length is None else {"length": length})}
    asked = Recipe.of({"evaluation": named, "dtype": dtype}, origin="options").evaluation
    assert asked is not None
    source = find_model(model)
    pieces = evaluation_windows(asked, source.tokenizer(), source.config(), stride=stride)
    tokenizer, share = source.tokenizer(), learned_share(source, pieces)
    loaded = load(model, dtype).to(place)
    with ConsoleProgress().stage(f"perplexity on {text}", len(pieces.tokens), "window") as advance:
        result = measure(loaded, tokenizer, pieces, asked.bos, advance, fresh=stride)
    stand_in = "; a stand-in" if pieces.stand_in else ""
    seen = f", {share:.0%} of which was calibrated or trained on" if share >= WORTH_SAYING else ""
    out.print(
        f"perplexity {result.value:.4f} on {text}{stand_in}{seen}: {len(pieces.tokens)} windows of "
        f"{pieces.tokens.shape[1]} "
        f"tokens{f' every {stride}' if stride else ''}, {result.predicted:,} predicted, bos {bos}, {loaded.dtype}",
        markup=False,
    )
    found = {"dtype": str(loaded.dtype), "perplexity": result.value, "nats": result.nats, "stride": stride}
    return {**found, "predicted": result.predicted, **result.windows, "learned_from": share}


def learned_share(source: ModelSource, measured: Windows) -> float:
    """Return the share of what is measured on that a folder says it was calibrated or trained on."""
    folder = Path(source.location)
    if not (folder / MANIFEST).is_file():
        return 0.0
    manifest = Manifest.read(folder)
    learned = [*([manifest.calibration] if manifest.calibration else []),
               *(one for entry in manifest.training for one in entry.data)]  # fmt: skip
    return overlap(measured, learned)


def perplexity_by_protocol(model: str, text: str, name: str, dtype: str, place: torch.device) -> dict[str, Any]:
    """Measure perplexity as a paper's code does."""
    source = find_model(model)
    tokenizer, protocol = source.tokenizer(), protocol_of(name)
    pieces = cut_by(protocol, find_text(text, evaluation=True, tokenizer=tokenizer), tokenizer, source.config())
    for deviation in pieces.deviations:
        err.print(f"note: not as {name} measures: {deviation}", markup=False)
    loaded = load(model, dtype).to(place)
    with ConsoleProgress().stage(f"perplexity on {text}", len(pieces.windows.tokens), "window") as advance:
        result = measure(loaded, tokenizer, pieces.windows, "none", advance, pieces.averaging)
    out.print(
        f"perplexity {result.value:.4f} on {text} as {name} measures ({protocol.source}): "
        f"{len(pieces.windows.tokens)} windows of {pieces.windows.tokens.shape[1]} tokens, mean over "
        f"{pieces.averaging}s, {result.predicted:,} predicted, {loaded.dtype}",
        markup=False,
    )
    found = {"dtype": str(loaded.dtype), "perplexity": result.value, "nats": result.nats, "protocol": name}
    return {**found, "predicted": result.predicted, "deviations": pieces.deviations, **result.windows}


def label(
    model: str, name: str, length: int | None, count: int | None, dtype: str, place: torch.device
) -> dict[str, Any]:
    """Let an encoder label examples."""
    source = find_model(model)
    config = source.config()
    if is_causal(config.architectures or []):
        raise ParedError(f"{model} is a language model; labelled examples are for encoders with a head for classes")
    most = Length.given(length, LABELLED_LENGTH).within(config, "labelled examples")
    pieces = cut_examples(find_examples(name), source.tokenizer(), config, most.tokens, count)
    loaded = load(model, dtype).to(place)
    with ConsoleProgress().stage(f"label {name}", batches(len(pieces.tokens), BATCH), "batch") as advance:
        score = classify(loaded, pieces, advance)
    told = ", ".join(f"{metric} {value:.4f}" for metric, value in score.metrics.items())
    out.print(f"{told} on {name}: {score.examples:,} examples, {score.labels:,} labels, {loaded.dtype}", markup=False)
    found = {"dtype": str(loaded.dtype), **score.metrics, "examples": score.examples, "labels": score.labels}
    return {**found, **pieces.describe()}


def fine_tune_for(model: str, names: list[str], asked: "FineTuning", place: torch.device, kept: Kept) -> dict[str, Any]:
    """Train an encoder for every task, and score it; what is done is kept."""
    from pared.entrypoints.fine_tune_encoder import examples_of, fine_tuned_score, require_encoder, steps_of, within

    require_encoder(model)
    asked = within(asked, find_model(model).config())
    parts = {name: examples_of(name) for name in names}  # a file that is missing, before the first is trained
    if not parts:
        raise ParedError("--fine-tune names no task")
    kept.begin({**_identity(model), **asdict(asked), "device": str(place)})
    for name, part in parts.items():
        if kept.has(name):
            continue
        with ConsoleProgress().stage(f"fine-tune {name}", steps_of(len(part.train.rows), asked), "step") as advance:
            score = fine_tuned_score(model, part, asked, place, advance)
        told = ", ".join(f"{metric} {value:.4f}" for metric, value in score.metrics.items())
        out.print(f"{name}: {told}; {score.examples:,} examples after {asked.epochs:g} epochs", markup=False)
        kept.add(name, {"task": name, **asdict(asked), **asdict(score)})
    return {"tasks": kept.results(names)}


def ask_about_images(model: str, path: Path, limit: int | None, dtype: str, place: torch.device) -> dict[str, Any]:
    """Ask a model about images."""
    questions, processor = questions_of(path, limit), processor_of(model)
    loaded = load(model, dtype).to(place)
    with ConsoleProgress().stage(f"answer {path.name}", batches(len(questions), BATCH_OF_IMAGES), "batch") as advance:
        result = answer_questions(loaded, processor, questions, BATCH_OF_IMAGES, advance)
    _tell(result, loaded.dtype)
    return {"dtype": str(loaded.dtype), "questions": str(path), **asdict(result)}


def _identity(model: str) -> dict[str, Any]:
    """Return what tells this model, these data and these programs from others."""
    return {"model": model, "digest": find_model(model).digest(), "data": str(data_folder() or "the Hub"), **versions()}


def do_tasks(
    model: str,
    names: list[str],
    limit: int | None,
    shots: int | None,
    sampling: Sampling,
    run_code: bool,
    dtype: str,
    place: torch.device,
    kept: Kept,
) -> dict[str, Any]:
    """Let a model do tasks: those in which it chooses, then those in which it writes; what is done is kept."""
    if not names:
        raise ParedError("--tasks names no task")
    for name in names:
        require_known("task", name, [*CHOICES, *TASKS])
    source = find_model(model)
    if not is_causal(source.config().architectures or []):
        raise ParedError(f"{model} is no causal language model, and does none of these tasks; see --fine-tune")
    chosen = [name for name in names if name in CHOICES]
    if chosen and sampling != Sampling() and len(chosen) == len(names):
        raise ParedError(f"--samples and --temperature are of answers that are written; {', '.join(chosen)} choose")
    written = [name for name in names if name not in CHOICES]
    for name in written:
        require_permission(task_of(name), run_code)
        require_possible(sampling, task_of(name).tokens)
    counts: dict[str, int] = {}
    for name in written:  # whatever is wrong with any, before loading
        task = task_of(name)
        counts[name] = len(rows_of(task, limit))
        examples_of(task, task.shots if shots is None else shots)
    asked = {"limit": limit, "shots": shots, **asdict(sampling), "dtype": dtype, "device": str(place)}
    settings = {**_identity(model), **asked}
    kept.begin(settings)
    prepared = [prepare([name], shots, limit) for name in chosen if not kept.has(name)]
    tokenizer = source.tokenizer()
    loaded = load(model, dtype).to(place)
    progress = ConsoleProgress()
    for part in prepared:
        (result,) = evaluate_choices(loaded, tokenizer, part, progress.stage, note=progress.note)
        _tell(result, loaded.dtype)
        kept.add(result.task, asdict(result))
    for name, count in counts.items():
        if not kept.has(name):
            result = _task(loaded, tokenizer, name, count, limit, shots, sampling, run_code)
            kept.add(name, asdict(result))
    return {**settings, "dtype": str(loaded.dtype), "tasks": kept.results([*chosen, *written])}


def _task(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    name: str,
    count: int,
    limit: int | None,
    shots: int | None,
    sampling: Sampling,
    run_code: bool,
) -> Result:
    ks = tuple(k for k in (1, 10, 100) if k <= sampling.samples)
    with ConsoleProgress().stage(name, batches(count, WRITTEN_TOGETHER), "batch") as advance:
        result = evaluate_task(
            model, tokenizer, name, limit, shots, sampling, run_code, ks, WRITTEN_TOGETHER, on_batch=advance
        )
    _tell(result, model.dtype)
    walls = {wall for row in result.answers for one in row["verdicts"] for wall in one.get("without", ())}
    if walls:
        err.print(f"note: this machine has no {', '.join(sorted(walls))}; programs ran without", markup=False)
    return result


def _tell(result: Result, dtype: torch.dtype) -> None:
    told = ", ".join(f"{metric} {value:.4f} ± {result.errors[metric]:.4f}" for metric, value in result.metrics.items())
    out.print(f"{result.task}: {told}; {result.rows:,} rows, {result.shots} shots, {dtype}", markup=False)
