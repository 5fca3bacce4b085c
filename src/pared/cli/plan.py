"""``pared plan``: every site's decision and the three sizes, from shapes alone."""

from rich.table import Table

from pared.cli import options
from pared.cli.console import JsonFile, errors, out, print_rows, quiet_libraries, write_json
from pared.engine import allocation_of, decided_from_data, plan_of
from pared.engine.early import require_model, require_possible, require_suited
from pared.engine.spec import anatomy_of
from pared.report.table import sizes
from pared.schema.plan import Dense


def plan(
    model: options.Model = None,
    recipe: options.RecipeFile = None,
    preset: options.Preset = None,
    method: options.Method = None,
    keep: options.Keep = None,
    rank_fraction: options.RankFraction = None,
    sparsity: options.Sparsity = None,
    pattern: options.Pattern = None,
    skip: options.Skip = None,
    blocks: options.Blocks = None,
    allocation: options.Allocation = None,
    storage: options.Storage = None,
    option: options.MethodOptions = None,
    dtype: options.Dtype = None,
    json_file: JsonFile = None,
) -> None:
    """Print what `pared compress` would do, without reading a single weight."""
    with errors():
        quiet_libraries()
        asked = options.recipe_of(
            recipe,
            {
                "model": model, "preset": preset, "method": method, "keep": keep, "rank_fraction": rank_fraction,
                "sparsity": sparsity, "pattern": pattern, "skip": skip, "blocks": blocks,
                "allocation": allocation, "storage": storage,
                "options": options.named_values(option), "dtype": dtype
            },
        )  # fmt: skip
        require_possible(asked)
        source = require_model(asked)
        require_suited(source.config(), asked, source.name)
        from pared.engine.result import stacks

        skeleton = source.skeleton()
        decided = plan_of(skeleton, asked, source.weight_bytes(asked.dtype))
        table = Table(header_style="bold")
        for column, justify in (("site", "left"), ("out x in", "right"), ("decision", "left"), ("parameters", "right")):
            table.add_column(column, justify=justify, overflow="fold")  # type: ignore[arg-type]
        for site in decided.sites:
            choice = site.decision
            told = f"dense: {choice.reason}" if isinstance(choice, Dense) else str(choice)
            table.add_row(site.name, f"{site.out_features} x {site.in_features}", told, f"{site.after:,}")
        for weight in decided.uncovered:
            shape = " x ".join(map(str, weight.shape))
            table.add_row(weight.name, shape, f"not covered: {weight.reason}", f"{weight.parameters:,}", style="dim")
        out.print(table)
        for line in stacks(anatomy_of(skeleton, asked)):
            out.print(line, markup=False)
        rows = sizes(decided, decided.before.bytes_on_disk, decided.after.bytes_on_disk)
        print_rows(f"{asked.model}  {asked.method}  {asked.budget}", rows)
        if decided_from_data(asked):
            out.print(f"allocation {allocation_of(asked)} looks at the model or data; this is uniform", markup=False)
        if decided.missed:
            out.print(decided.missed, markup=False)
        write_json(json_file, decided.model_dump(mode="json"))
