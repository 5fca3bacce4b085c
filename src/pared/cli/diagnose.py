"""``pared diagnose``: what a method's order of directions is worth."""

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from pared.cli.console import ConsoleProgress, JsonFile, errors, print_result, quiet_libraries, write_json
from pared.cli.from_schema import Change, Fields, Given, schema_options
from pared.cli.options import SHAPES
from pared.entrypoints.checks import require_rank_groups
from pared.schema.recipe import Recipe
from pared.tables import Table

if TYPE_CHECKING:
    from pared.entrypoints.rank_groups import RankGroups

diagnose = typer.Typer(help="Examine what a method does to a model.", no_args_is_help=True, rich_markup_mode=None)

FIELDS = Fields(
    Recipe,
    (*SHAPES, "method", "calibrate_on", "calibration", "evaluation", "device"),
    changed={
        "method": Change(default="loss-optimal"),
        "evaluation.text": Change(
            "Text, or labelled examples for a classifier (glue:cola:dev, ner:wnut17:dev, file:PATH), that quality is "
            "measured on.",
            default="the held-out part of the calibration data",
        ),
        "evaluation.windows": Change("Evaluation windows, or examples.", default="20 windows, 200 examples"),
    },
)


@diagnose.callback()
def _diagnose() -> None:
    """Keep the command's name although it is the only one."""


@diagnose.command("rank-groups")
@schema_options
def rank_groups(
    given: Annotated[Given[Recipe], FIELDS],
    groups: Annotated[int, typer.Option(help="Groups that the directions of every weight are split into.")] = 10,
    json_file: JsonFile = None,
) -> None:
    """Take one group of every weight's directions out at a time and measure the model (FWSVD's brute-force attack)."""
    with errors():
        quiet_libraries()
        recipe = given.merged()
        require_rank_groups(recipe)
        from pared.entrypoints.rank_groups import run

        result = run(recipe, groups, ConsoleProgress())
        print_groups(result, f"{recipe.model}  {recipe.method}")
        write_json(json_file, {"model": recipe.model, "recipe": recipe.model_dump(mode="json"), **asdict(result)})


def print_groups(result: "RankGroups", title: str) -> None:
    """Print what the model is worth without each group of directions."""
    count = len(result.groups)
    rows = [("none", "", "0", *(text for value in result.before.values() for text in (f"{value:.6g}", "")))]
    for group in result.groups:
        share = f"{(group.number - 1) / count:.0%}-{group.number / count:.0%}"
        changes = ((f"{value:.6g}", f"{value - result.before[name]:+.3g}") for name, value in group.quality.items())
        rows.append((str(group.number), share, f"{group.error:.4f}", *(text for pair in changes for text in pair)))
    qualities = (column for name in result.before for column in (name, "change"))
    left = result.untouched
    on = result.evaluation
    lines = [
        *([f"{len(left)} sites left whole, the first is {left[0]}"] if left else []),
        f"measured on {on['text']}: {on['windows']} x {on['length']} tokens",
    ]
    print_result(Table(title, ("group", "directions", "error", *qualities), rows, lines, align="r"))
