"""``pared plan``: every site's decision and the three sizes, from shapes alone."""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated

from pared.cli.console import JsonFile, errors, out, print_result, quiet_libraries, write_json
from pared.cli.from_schema import Fields, Given, schema_options
from pared.cli.options import PLANNED, RECIPE_FILE
from pared.schema.recipe import Recipe
from pared.tables import Table

if TYPE_CHECKING:
    from pared.schema.plan import Plan


@schema_options
def plan(
    given: Annotated[Given[Recipe], Fields(Recipe, PLANNED, file=RECIPE_FILE)],
    json_file: JsonFile = None,
) -> None:
    """Print what `pared compress` would do, without reading a single weight."""
    with errors():
        quiet_libraries()
        recipe = given.merged()
        from pared.engine.early import require_model, require_possible, require_suited

        spec = require_possible(recipe)
        source = require_model(spec)
        require_suited(source.config(), spec, source.name)
        from pared.engine.allocate import anatomy_of, plan_from_shapes
        from pared.engine.result import stacks

        skeleton = source.skeleton()
        decided = plan_from_shapes(skeleton, spec, source.weight_bytes(recipe.dtype))
        print_plan(decided, stacks(anatomy_of(skeleton, recipe)), f"{recipe.model}  {recipe.method}  {recipe.budget}")
        if spec.decided_from_data:
            out.print(f"allocation {spec.allocator.name} looks at the model or data; this is uniform")
        if decided.missed:
            out.print(decided.missed)
        write_json(json_file, decided.model_dump(mode="json"))


def print_plan(plan: "Plan", stacks: Iterable[str], title: str) -> None:
    """Print every site's decision, the stacks of blocks, and the sizes before and after."""
    from pared.schema.plan import Dense

    rows = []
    for site in plan.sites:
        choice = site.decision
        told = f"dense: {choice.reason}" if isinstance(choice, Dense) else str(choice)
        rows.append((site.name, f"{site.out_features} x {site.in_features}", told, f"{site.after:,}"))
    for weight in plan.uncovered:
        shape = " x ".join(map(str, weight.shape))
        rows.append((weight.name, shape, f"not covered: {weight.reason}", f"{weight.parameters:,}"))
    columns = ("site", "out x in", "decision", "parameters")
    print_result(Table("", columns, rows, tuple(stacks), align="lrlr", faint_from=len(plan.sites)))
    print_result(Table.comparison(title, plan.sizes()))
