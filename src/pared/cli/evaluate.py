"""``pared eval``: what a model, dense or compressed, is worth."""

from typing import Annotated

import typer

from pared.checkpoint import load
from pared.cli.console import ConsoleProgress, JsonFile, errors, out, quiet_libraries, write_json
from pared.errors import ParedError
from pared.evaluation import perplexity as measure
from pared.hardware import device_of
from pared.recipe import Recipe
from pared.sources.models import find_model
from pared.sources.texts import find_text
from pared.sources.windows import cut


def evaluate(
    model: Annotated[str, typer.Argument(help="A folder that pared made, or any named model.")],
    perplexity: Annotated[str | None, typer.Option(help="Text to measure perplexity on.")] = None,
    length: Annotated[int, typer.Option(help="Tokens in a window.")] = 1024,
    windows: Annotated[int | None, typer.Option(help="Windows from the start; all if not given.")] = None,
    bos: Annotated[str, typer.Option(help="Beginning-of-sequence token before: none, text, window.")] = "none",
    dtype: Annotated[str, typer.Option(help="What the model is loaded in; auto keeps what is stored.")] = "auto",
    device: Annotated[str, typer.Option(help="Where it runs.")] = "cpu",
    json_file: JsonFile = None,
) -> None:
    """Measure a model."""
    with errors():
        quiet_libraries()
        if perplexity is None:
            raise ParedError("nothing to measure; pass --perplexity TEXT")
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
