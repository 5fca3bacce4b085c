"""``pared search``: which program spreads zeros, or ranks, best over a model."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pared.cli.console import ConsoleProgress, JsonFile, errors, out, quiet_libraries, write_json
from pared.cli.from_schema import Change, Fields, Given, schema_options
from pared.cli.options import SHAPES, Resume
from pared.entrypoints.checks import require_search
from pared.errors import ParedError
from pared.report.plots import require_plotting
from pared.report.search_trace import against as finished_beside
from pared.report.search_trace import draw
from pared.schema.recipe import Recipe
from pared.schema.search import SearchConfig

if TYPE_CHECKING:
    from pared.entrypoints.search_found import Found

SEARCHED = (*SHAPES, "method", "keep", "sparsity", "storage", "device", "calibrate_on", "calibration.text",
            "calibration.samples", "calibration.dtype")  # fmt: skip
FIELDS = Fields(
    Recipe,
    SEARCHED,
    changed={
        "method": Change(
            "Search for zeros (wanda, magnitude) with --sparsity, or for ranks (a low-rank method) with --keep.",
            default="",
        ),
        "calibration.samples": Change(value=64),
    },
)


@schema_options
def search(
    given: Annotated[Given[Recipe], FIELDS],
    config: Annotated[Given[SearchConfig], Fields(SearchConfig)],
    pruner: Annotated[str | None, typer.Option(hidden=True, help="The name that --method had once.")] = None,
    ray: Annotated[str | None, typer.Option(help="Measure on a Ray cluster: its address, auto, or local.")] = None,
    plot: Annotated[bool, typer.Option("--plot", help="Draw the best so far to trace.png.")] = False,
    against: Annotated[
        str | None, typer.Option(help="Folder of another search, such as a random one, to draw for comparison.")
    ] = None,
    folder: Annotated[Path | None, typer.Option("--out", help="The folder to make.")] = None,
    resume: Resume = None,
    json_file: JsonFile = None,
) -> None:
    """Search for the program that allocates sparsity or ranks best."""
    with errors("what was measured is in the journal, and --resume continues from there"):
        quiet_libraries()
        if folder is None:
            raise ParedError("no output folder is named; give --out DIR")
        if pruner is not None:
            raise ParedError(f"--pruner is --method now, as of pared compress: --method {pruner}")
        if given.values["method"] is None:
            raise ParedError("name what to search for: zeros (--method wanda --sparsity 0.7) or ranks "
                             "(--method svd-llm --keep 0.8)")  # fmt: skip
        if plot or against:
            require_plotting("--plot and --against")
        recipe, settings = given.merged(), config.merged()
        require_search(recipe)
        from pared.entrypoints.search import pools_on, run
        from pared.entrypoints.search_found import TRACE

        found = run(recipe, settings, folder, ConsoleProgress(), pools_on(ray), resume)
        print_found(found)
        if plot or against:
            other = {} if against is None else finished_beside(found.told["settings"], against)
            out.print(f"trace: {draw(found.told, other, folder / TRACE)}")
        write_json(json_file, {"folder": str(found.folder), **found.told})


def print_found(found: "Found") -> None:
    """Print the best program, what it is worth and how it is used."""
    told = found.told
    out.print(f"best program: {found.program}")
    for name, key in (("dense", "dense"), ("uniform", "uniform"), ("best", "perplexity")):
        search, full = told[key]["search"], told[key]["full"]
        where = f"{_number(search)} on the windows of the search, {_number(full)} on the full split"
        out.print(f"perplexity {name}: {where}")
    for line in found.remarks():
        out.print(line)


def _number(value: float | None) -> str:
    return "infinite" if value is None else f"{value:.4f}"
