"""``pared demo``: the main job on what is embedded, with a sentence from before and after."""

from pathlib import Path
from typing import Annotated

import typer

from pared.cli.compress import print_manifest
from pared.cli.console import ConsoleProgress, JsonFile, errors, out, quiet_libraries, write_json
from pared.entrypoints.folder import continuations
from pared.io.files import cache_folder
from pared.schema.recipe import Recipe

PROMPT = "The most important thing about a good tool is"
TOKENS = 40


def demo(
    folder: Annotated[
        Path | None, typer.Option("--out", help="The folder to make. [default: in the user's cache]")
    ] = None,
    json_file: JsonFile = None,
) -> None:
    """Compress the embedded model on the embedded text; a second run reuses what the first one made."""
    with errors():
        quiet_libraries()
        place = folder or cache_folder() / "demo"
        recipe = Recipe.of({"preset": "demo", "out": str(place)})
        given = recipe.calibration
        out.print(
            f"pared compress {recipe.model} --method {recipe.method} --keep {recipe.keep:g} --data {given.text} "
            f"--samples {given.samples} --length {given.length} --out {place}"
        )
        from pared.entrypoints.run import reusable, run

        outcome = reusable(recipe)
        if outcome is None:
            outcome = run(recipe, overwrite=folder is None, progress=ConsoleProgress(), resume=False)
        else:
            out.print(f"reusing {place} of an earlier run; remove it to run again")
        print_manifest(outcome.manifest, str(place))
        write_json(json_file, {"folder": str(place), **outcome.manifest.model_dump(mode="json")})
        assert recipe.model is not None
        texts = continuations([recipe.model, str(place)], PROMPT, TOKENS)
        for when, text in zip(("before", "after"), texts, strict=True):
            out.print(f"\n{when}: {PROMPT}{text}")
        out.print("\nsvd-llm is the quick one: untrained, a small model loses much by it at this size, and far less by "
                  "the default, loss-optimal.")  # fmt: skip
