"""``pared search``: which program spreads zeros, or ranks, best over a model."""

from typing import TYPE_CHECKING, Annotated

import typer

from pared.cli import console, options
from pared.cli.console import ConsoleProgress, JsonFile, errors, quiet_libraries, write_json
from pared.engine.early import require_model, require_possible
from pared.errors import ParedError
from pared.names import require_known
from pared.report.search_trace import against, draw, require_plotting

if TYPE_CHECKING:
    from pared.entrypoints.search import Found
    from pared.search.evolution import Strategy

STRATEGIES = ("evolution", "random")


def search(
    model: options.Model = None,
    pruner: Annotated[str | None, typer.Option(help="Search for zeros: wanda or magnitude.")] = None,
    sparsity: options.Sparsity = None,
    method: Annotated[
        str | None, typer.Option(help="Search for ranks in place of zeros: a low-rank method, with --keep.")
    ] = None,
    keep: options.Keep = None,
    storage: options.Storage = None,
    skip: options.Skip = None,
    blocks: options.Blocks = None,
    option: options.MethodOptions = None,
    iterations: Annotated[int, typer.Option(help="Candidates after the first population.")] = 1000,
    population: Annotated[int, typer.Option(help="Programs that may become parents.")] = 20,
    sample_ratio: Annotated[float, typer.Option(help="Part of the population that parents are looked for in.")] = 0.9,
    top: Annotated[int, typer.Option(help="The best of that part, and those measured on the full split at last.")] = 5,
    seed: Annotated[int, typer.Option(help="Of the search.")] = 0,
    strategy: Annotated[str, typer.Option(help="evolution, or random programs to compare with.")] = "evolution",
    workers: Annotated[int, typer.Option(help="Candidates measured at a time.")] = 1,
    ray: Annotated[
        str | None, typer.Option(help="Measure on a Ray cluster: its address, auto, or local.", show_default=False)
    ] = None,
    data: options.Data = None,
    samples: Annotated[int, typer.Option(help="Calibration windows.")] = 64,
    windows: Annotated[int, typer.Option(help="Windows of the search split that every candidate is measured on.")] = 8,
    length: Annotated[
        int | None, typer.Option(help="Tokens in a window, of calibration too. [default: 1024]", show_default=False)
    ] = None,
    final_windows: Annotated[
        int | None, typer.Option(help="Windows of the search split for the best. [default: all]", show_default=False)
    ] = None,
    halving: Annotated[bool, typer.Option(help="Stop candidates that are behind after a quarter, or half.")] = False,
    calibration_dtype: options.CalibrationDtype = None,
    dtype: options.Dtype = None,
    device: options.Device = None,
    plot: Annotated[bool, typer.Option("--plot", help="Draw the best so far to trace.png.")] = False,
    against_folder: Annotated[
        str | None, typer.Option("--against", help="Folder of another search, such as a random one, to draw beside.")
    ] = None,
    out: options.Out = None,
    json_file: JsonFile = None,
) -> None:
    """Search for the program that spreads zeros or ranks best; a search that was stopped resumes where it was."""
    with errors("interrupted; what was measured is in the journal, the same command resumes from there"):
        quiet_libraries()
        if out is None:
            raise ParedError("no output folder is named; give --out DIR")
        if (pruner is None) == (method is None):
            raise ParedError("name what to search for: zeros (--pruner wanda --sparsity 0.7) or ranks "
                             "(--method svd-llm --keep 0.8)")  # fmt: skip
        if plot or against_folder:
            require_plotting()
        asked = options.recipe_of(
            None,
            {
                "model": model,
                "method": pruner or method,
                "sparsity": sparsity,
                "keep": keep,
                "storage": storage,
                "skip": skip,
                "blocks": blocks,
                "options": options.named_values(option),
                "calibration.text": data,
                "calibration.samples": samples,
                "calibration.length": length,
                "calibration.dtype": calibration_dtype,
                "dtype": dtype,
                "device": device,
            },
        )
        found_strategy = strategy_of(strategy)
        require_possible(asked)
        require_model(asked)
        from pared.entrypoints.search import Look, run
        from pared.search.evolution import Rules

        rules = Rules(iterations, population, sample_ratio, top, seed, found_strategy, workers)
        look = Look(windows, length, final_windows, halving)
        pools = None
        if ray is not None:
            from pared.search.ray_pool import on_ray

            pools = on_ray(ray)
        found = run(asked, rules, look, out, ConsoleProgress(), pools)
        tell(found)
        if plot or against_folder:
            other = {} if against_folder is None else against(found.told["settings"], against_folder)
            console.out.print(f"trace: {draw(found.told, other, out / 'trace.png')}", markup=False)
        write_json(json_file, {"folder": str(found.folder), **found.told})


def strategy_of(name: str) -> "Strategy":
    """Return a strategy by name.

    Raises:
        ParedError: there is none.
    """
    require_known("strategy", name, STRATEGIES)
    return name  # type: ignore[return-value]


def tell(found: "Found") -> None:
    """Print the best program, what it is worth and how it is used."""
    from pared.entrypoints.search import FOUND

    told = found.told
    console.out.print(f"best program: {found.program}", markup=False)
    for name, key in (("dense", "dense"), ("uniform", "uniform"), ("best", "perplexity")):
        search, full = told[key]["search"], told[key]["full"]
        where = f"{_number(search)} on the windows of the search, {_number(full)} on the full split"
        console.out.print(f"perplexity {name}: {where}", markup=False)
    if told["uniform"]["full"] is not None and told["uniform"]["full"] <= told["perplexity"]["full"]:
        console.out.print(
            "on the full split the uniform allocation is no worse: search longer or on more windows", markup=False
        )
    console.out.print(f"use it: --allocation dsa --allocation-option program={found.folder / FOUND}", markup=False)


def _number(value: float | None) -> str:
    return "infinite" if value is None else f"{value:.4f}"
