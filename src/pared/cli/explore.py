"""``pared explore``: one calibration, and every budget as a curve."""

import shlex
from pathlib import Path
from typing import Annotated

import typer

from pared.cli.console import ConsoleProgress, JsonFile, errors, out, print_result, quiet_libraries, write_json
from pared.cli.from_schema import Change, Fields, Given, schema_options
from pared.cli.options import RECIPE_FILE, SHAPES
from pared.entrypoints.checks import require_exploration
from pared.errors import ParedError
from pared.report.plots import require_plotting
from pared.schema.command_line import as_words
from pared.schema.explore import ExploreConfig
from pared.schema.recipe import Recipe

EXPLORED = (*SHAPES, "method", "storage", "heads", "multiple_of", "calibrate_on", "calibration", "evaluation", "device")
FIELDS = Fields(
    Recipe,
    EXPLORED,
    file=RECIPE_FILE,
    changed={"method": Change("The method of ranks and widths; its losses add up.", default="loss-optimal")},
)


@schema_options
def explore(
    given: Annotated[Given[Recipe], FIELDS],
    config: Annotated[Given[ExploreConfig], Fields(ExploreConfig)],
    plot: Annotated[
        Path | None, typer.Option("--plot", help="Draw the curves to this file: .svg, .png or .pdf.")
    ] = None,
    json_file: JsonFile = None,
) -> None:
    """Calibrate once, and show what every budget is predicted to cost; measure some, and pick one."""
    with errors("interrupted; nothing is kept of it"):
        quiet_libraries()
        if plot is not None:
            require_plotting("--plot")
        recipe, settings = given.merged(), config.merged()
        require_exploration(recipe, settings)
        from pared.entrypoints.explore import run

        if recipe.model is None:
            raise ParedError("no model is named; give embedded:smollm2-135m, a folder, a .gguf file or a Hub id")
        found = run(recipe, settings, ConsoleProgress())
        print_result(found.table())
        if found.picked is not None:
            words = shlex.join(["pared", "compress", *as_words(found.picked)])
            out.print(f"compress to it: {words} --out DIR")
        if plot is not None:
            found.plot(plot)
            out.print(f"picture: {plot}")
        write_json(json_file, found.model_dump(mode="json"))
