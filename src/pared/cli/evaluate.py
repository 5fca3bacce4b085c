"""``pared eval``: what a model, dense or compressed, is worth."""

from pathlib import Path
from typing import Annotated

import typer

from pared.checkpoint import load
from pared.cli.console import ConsoleProgress, JsonFile, errors, out, quiet_libraries, write_json
from pared.errors import ParedError
from pared.evaluation import classify
from pared.evaluation import perplexity as measure
from pared.evaluation.classification import BATCH, batches
from pared.hardware import device_of
from pared.recipe import Recipe
from pared.sources.labelled import find_examples
from pared.sources.labelled_windows import cut_examples
from pared.sources.models import find_model, is_causal
from pared.sources.texts import find_text
from pared.sources.windows import cut


def evaluate(
    model: Annotated[str, typer.Argument(help="A folder that pared made, or any named model.")],
    perplexity: Annotated[str | None, typer.Option(help="Text to measure perplexity on.")] = None,
    examples: Annotated[
        str | None, typer.Option(help="Labelled examples to label: glue:sst2:dev, ner:wnut17:test, file:PATH.")
    ] = None,
    length: Annotated[int, typer.Option(help="Tokens in a window.")] = 1024,
    windows: Annotated[int | None, typer.Option(help="Windows from the start; all if not given.")] = None,
    bos: Annotated[str, typer.Option(help="Beginning-of-sequence token before: none, text, window.")] = "none",
    dtype: Annotated[str, typer.Option(help="What the model is loaded in; auto keeps what is stored.")] = "auto",
    device: Annotated[str, typer.Option(help="Where it runs.")] = "cpu",
    json_file: JsonFile = None,
) -> None:
    """Measure a model: perplexity on a text, or for an encoder what it gets right of labelled examples."""
    with errors():
        quiet_libraries()
        if (perplexity is None) == (examples is None):
            raise ParedError("pass one thing to measure: --perplexity TEXT, or --examples NAME for an encoder")
        if perplexity is None:
            assert examples is not None
            _examples(model, examples, length, windows, dtype, device, json_file)
            return
        asked = Recipe.of(
            {"evaluation": {"text": perplexity, "length": length, "windows": windows, "bos": bos}, "dtype": dtype},
            origin="options",
        ).evaluation
        assert asked is not None
        place = device_of(device)
        tokenizer = find_model(model).tokenizer()
        pieces = cut(find_text(perplexity, evaluation=True), tokenizer, asked.length, asked.windows)
        loaded = load(model, dtype).to(place)
        with ConsoleProgress().stage(f"perplexity on {perplexity}", len(pieces.tokens), "window") as advance:
            result = measure(loaded, tokenizer, pieces, asked.bos, advance)
        stand_in = "; a stand-in" if pieces.stand_in else ""
        out.print(
            f"perplexity {result.value:.4f} on {perplexity}{stand_in}: {len(pieces.tokens)} windows of {length} "
            f"tokens, {result.predicted:,} predicted, bos {bos}, {loaded.dtype}",
            markup=False,
        )
        write_json(
            json_file,
            {
                "model": model,
                "dtype": str(loaded.dtype),
                "perplexity": result.value,
                "nats": result.nats,
                "predicted": result.predicted,
                **result.windows,
            },
        )


def _examples(
    model: str, name: str, length: int, count: int | None, dtype: str, device: str, json_file: Path | None
) -> None:
    place = device_of(device)
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
    result = {"model": model, "dtype": str(loaded.dtype), **score.metrics, "examples": score.examples}
    write_json(json_file, {**result, "labels": score.labels, **pieces.describe()})
