"""``pared eval``: what a model, dense or compressed, is worth."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pared.checkpoint import load
from pared.cli.console import ConsoleProgress, JsonFile, err, errors, out, quiet_libraries, write_json
from pared.errors import ParedError
from pared.evaluation import TASKS, Result, Sampling, classify, evaluate_task, task_of
from pared.evaluation import perplexity as measure
from pared.evaluation.choice import CHOICES, evaluate_choices, prepare
from pared.evaluation.classification import BATCH, batches
from pared.evaluation.protocols import cut_by, protocol_of
from pared.evaluation.tasks import require_leave, rows_of
from pared.evaluation.vision import BATCH as BATCH_OF_IMAGES
from pared.evaluation.vision import answer_questions, processor_of, questions_of
from pared.hardware import device_of
from pared.names import require_known
from pared.recipe import Recipe
from pared.sources.labelled import find_examples
from pared.sources.labelled_windows import cut_examples
from pared.sources.models import find_model, is_causal
from pared.sources.texts import find_text
from pared.sources.windows import cut
from pared.training.encoders import FineTuning, examples_of, fine_tuned_score, steps_of

WRITTEN_TOGETHER = 8  # prompts
LENGTH = 1024
# What each measure reads of the options, beside --device and --json.
READS = {
    "perplexity": ("length", "windows", "stride", "bos", "dtype"),
    "perplexity --protocol": ("protocol", "dtype"),
    "examples": ("length", "windows", "dtype"),
    "tasks": ("limit", "shots", "samples", "temperature", "allow-code-execution", "dtype"),
    "vqa": ("limit", "dtype"),
    "fine-tune": ("epochs", "learning-rate", "length", "limit"),
}


def evaluate(
    model: Annotated[str, typer.Argument(help="A folder that pared made, or any named model.")],
    perplexity: Annotated[str | None, typer.Option(help="Text to measure perplexity on.")] = None,
    examples: Annotated[
        str | None, typer.Option(help="Labelled examples to label: glue:sst2:dev, ner:wnut17:test, file:PATH.")
    ] = None,
    tasks: Annotated[
        str | None, typer.Option(help=f"Tasks to do, with commas: {', '.join([*CHOICES, *TASKS])}.")
    ] = None,
    vqa: Annotated[
        str | None, typer.Option(help="Questions about images: a .jsonl file of image, question, answers.")
    ] = None,
    fine_tune: Annotated[
        str | None,
        typer.Option(help="Tasks an encoder is fine-tuned for and scored on, with commas: glue:cola, ner:wnut17."),
    ] = None,
    epochs: Annotated[float | None, typer.Option(help="Of fine-tuning. [default: 3]")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Of fine-tuning. [default: 5e-5]")] = None,
    length: Annotated[
        int | None, typer.Option(help="Tokens in a window (1024), or the most of an example (1024; fine-tuning 128).")
    ] = None,
    windows: Annotated[int | None, typer.Option(help="Windows from the start; all if not given.")] = None,
    stride: Annotated[
        int | None, typer.Option(help="Windows overlap and begin every so many tokens; each counts its last so many.")
    ] = None,
    protocol: Annotated[
        str | None, typer.Option(help="Cut and average as a paper does: svd-llm, basis-sharing, wanda, gptq.")
    ] = None,
    bos: Annotated[
        str | None, typer.Option(help="Beginning-of-sequence token before: none, text, window. [default: none]")
    ] = None,
    limit: Annotated[
        int | None, typer.Option(help="The most rows (to train on, of fine-tuning), from the first.")
    ] = None,
    shots: Annotated[int | None, typer.Option(help="Examples before a prompt; the task's own if not given.")] = None,
    samples: Annotated[int | None, typer.Option(help="Answers to every prompt of a task. [default: 1]")] = None,
    temperature: Annotated[
        float | None, typer.Option(help="Of answers; 0 takes the likeliest token. [default: 0]")
    ] = None,
    allow_code_execution: Annotated[
        bool,
        typer.Option(
            "--allow-code-execution", help="Run the programs a model writes; limits are no security boundary."
        ),
    ] = False,
    dtype: Annotated[str, typer.Option(help="What the model is loaded in; auto keeps what is stored.")] = "auto",
    device: Annotated[str, typer.Option(help="Where it runs.")] = "cpu",
    json_file: JsonFile = None,
) -> None:
    """Measure a model: perplexity on a text, tasks it does, or what an encoder gets right of labelled examples."""
    with errors():
        quiet_libraries()
        given = {
            "perplexity": perplexity,
            "examples": examples,
            "tasks": tasks,
            "vqa": vqa,
            "fine-tune": fine_tune,
        }
        asked = [name for name, value in given.items() if value is not None]
        if len(asked) != 1:
            raise ParedError(f"pass one thing to measure: {', '.join(f'--{name}' for name in given)}")
        options = {
            "length": length, "windows": windows, "stride": stride, "bos": bos, "protocol": protocol,
            "epochs": epochs, "learning-rate": learning_rate, "limit": limit, "shots": shots, "samples": samples,
            "temperature": temperature, "allow-code-execution": allow_code_execution or None,
            "dtype": None if dtype == "auto" else dtype,
        }  # fmt: skip
        _require_read(asked[0] if protocol is None else "perplexity --protocol", options)
        place = device_of(device)
        if perplexity is not None and protocol is not None:
            result = _by_protocol(model, perplexity, protocol, dtype, place)
        elif perplexity is not None:
            result = _perplexity(model, perplexity, length or LENGTH, windows, stride, bos or "none", dtype, place)
        elif examples is not None:
            result = _examples(model, examples, length or LENGTH, windows, dtype, place)
        elif fine_tune is not None:
            how = {"epochs": epochs, "learning_rate": learning_rate, "length": length, "examples": limit}
            chosen = FineTuning(**{name: value for name, value in how.items() if value is not None})  # type: ignore[arg-type]
            result = _fine_tuned(model, _names(fine_tune), chosen, place)
        elif vqa is not None:
            result = _vqa(model, Path(vqa), limit, dtype, place)
        else:
            sampling = Sampling(
                temperature=0.0 if temperature is None else temperature, samples=1 if samples is None else samples
            )
            result = _tasks(model, _names(tasks or ""), limit, shots, sampling, allow_code_execution, dtype, place)
        write_json(json_file, {"model": model, **result})


def _require_read(measure: str, options: dict[str, Any]) -> None:
    """Refuse options that a measure does not read."""
    for name, value in options.items():
        if value is not None and name not in READS[measure]:
            raise ParedError(
                f"--{measure} reads no --{name} (found {value}); it reads "
                f"{', '.join(f'--{one}' for one in READS[measure])}"
            )


def _names(given: str) -> list[str]:
    """Return names that stand between commas, each once."""
    return list(dict.fromkeys(name.strip() for name in given.split(",") if name.strip()))


def _perplexity(
    model: str,
    text: str,
    length: int,
    windows: int | None,
    stride: int | None,
    bos: str,
    dtype: str,
    place: torch.device,
) -> dict[str, Any]:
    asked = Recipe.of(
        {"evaluation": {"text": text, "length": length, "windows": windows, "bos": bos}, "dtype": dtype},
        origin="options",
    ).evaluation
    assert asked is not None
    tokenizer = find_model(model).tokenizer()
    pieces = cut(find_text(text, evaluation=True), tokenizer, asked.length, asked.windows, stride=stride)
    loaded = load(model, dtype).to(place)
    with ConsoleProgress().stage(f"perplexity on {text}", len(pieces.tokens), "window") as advance:
        result = measure(loaded, tokenizer, pieces, asked.bos, advance, fresh=stride)
    stand_in = "; a stand-in" if pieces.stand_in else ""
    out.print(
        f"perplexity {result.value:.4f} on {text}{stand_in}: {len(pieces.tokens)} windows of {length} "
        f"tokens{f' every {stride}' if stride else ''}, {result.predicted:,} predicted, bos {bos}, {loaded.dtype}",
        markup=False,
    )
    found = {"dtype": str(loaded.dtype), "perplexity": result.value, "nats": result.nats, "stride": stride}
    return {**found, "predicted": result.predicted, **result.windows}


def _by_protocol(model: str, text: str, name: str, dtype: str, place: torch.device) -> dict[str, Any]:
    source = find_model(model)
    tokenizer, protocol = source.tokenizer(), protocol_of(name)
    pieces = cut_by(protocol, find_text(text, evaluation=True), tokenizer, source.config())
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


def _examples(model: str, name: str, length: int, count: int | None, dtype: str, place: torch.device) -> dict[str, Any]:
    source = find_model(model)
    config = source.config()
    if is_causal(config.architectures or []):
        raise ParedError(f"{model} is a language model; labelled examples are for encoders with a head for classes")
    positions = getattr(config, "max_position_embeddings", None) or length
    pieces = cut_examples(find_examples(name), source.tokenizer(), config, min(length, positions), count)
    loaded = load(model, dtype).to(place)
    with ConsoleProgress().stage(f"label {name}", batches(len(pieces.tokens), BATCH), "batch") as advance:
        score = classify(loaded, pieces, advance)
    told = ", ".join(f"{metric} {value:.4f}" for metric, value in score.metrics.items())
    out.print(f"{told} on {name}: {score.examples:,} examples, {score.labels:,} labels, {loaded.dtype}", markup=False)
    found = {"dtype": str(loaded.dtype), **score.metrics, "examples": score.examples, "labels": score.labels}
    return {**found, **pieces.describe()}


def _fine_tuned(model: str, names: list[str], asked: FineTuning, place: torch.device) -> dict[str, Any]:
    parts = {name: examples_of(name) for name in names}  # a file that is missing, before the first is trained
    if not parts:
        raise ParedError("--fine-tune names no task")
    found = []
    for name, part in parts.items():
        with ConsoleProgress().stage(f"fine-tune {name}", steps_of(len(part.train.rows), asked), "step") as advance:
            score = fine_tuned_score(model, part, asked, place, advance)
        told = ", ".join(f"{metric} {value:.4f}" for metric, value in score.metrics.items())
        out.print(f"{name}: {told}; {score.examples:,} examples after {asked.epochs:g} epochs", markup=False)
        found.append({"task": name, **asdict(asked), **asdict(score)})
    return {"tasks": found}


def _vqa(model: str, path: Path, limit: int | None, dtype: str, place: torch.device) -> dict[str, Any]:
    questions, processor = questions_of(path, limit), processor_of(model)
    loaded = load(model, dtype).to(place)
    with ConsoleProgress().stage(f"answer {path.name}", batches(len(questions), BATCH_OF_IMAGES), "batch") as advance:
        result = answer_questions(loaded, processor, questions, BATCH_OF_IMAGES, advance)
    _tell(result, loaded.dtype)
    return {"dtype": str(loaded.dtype), "questions": str(path), **asdict(result)}


def _tasks(
    model: str,
    names: list[str],
    limit: int | None,
    shots: int | None,
    sampling: Sampling,
    run_code: bool,
    dtype: str,
    place: torch.device,
) -> dict[str, Any]:
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
        require_leave(task_of(name), run_code)
    counts = {
        name: len(rows_of(task_of(name), limit)) for name in written
    }  # whatever is wrong with them, before loading
    prepared = prepare(chosen, shots, limit) if chosen else None
    tokenizer = source.tokenizer()
    loaded = load(model, dtype).to(place)
    progress = ConsoleProgress()
    results = (
        [] if prepared is None else evaluate_choices(loaded, tokenizer, prepared, progress.stage, note=progress.note)
    )
    for result in results:
        _tell(result, loaded.dtype)
    for name, count in counts.items():
        results.append(_task(loaded, tokenizer, name, count, limit, shots, sampling, run_code))
    return {"dtype": str(loaded.dtype), "tasks": [asdict(result) for result in results]}


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
