"""``pared plan``: every site's decision and the three sizes, from shapes alone."""

from typing import Annotated

import typer

from pared.cli.console import JsonFile, errors, print_result, quiet_libraries, write_json
from pared.cli.from_schema import Fields, Given, schema_options
from pared.cli.options import COSTED, PLANNED, RECIPE_FILE
from pared.entrypoints.checks import require_plan
from pared.schema.recipe import Recipe


@schema_options
def plan(
    given: Annotated[Given[Recipe], Fields(Recipe, (*PLANNED, *COSTED), file=RECIPE_FILE)],
    cost: Annotated[
        bool,
        typer.Option(
            "--cost",
            help="Predict time, memory and disk of the compression; this machine is measured for about 20 seconds, "
            "at most once a week. The texts are read.",
        ),
    ] = False,
    machine: Annotated[
        str | None,
        typer.Option(help="Predict for another machine, computed from published figures: h100."),
    ] = None,
    full: Annotated[bool, typer.Option("--full", help="List every layer by name, not every kind of layer.")] = False,
    json_file: JsonFile = None,
) -> None:
    """Print what `pared compress` would do, without reading a single weight."""
    with errors():
        quiet_libraries()
        recipe = given.merged()
        require_plan(recipe)
        from pared.entrypoints.plan import plan_of

        planned = plan_of(recipe, cost, machine)
        for table in planned.tables(full):
            print_result(table)
        write_json(json_file, planned.describe())
