"""``pared compress``: a model in, a smaller folder out."""

from typing import TYPE_CHECKING, Annotated

from pared.cli.console import ConsoleProgress, JsonFile, errors, out, print_rows, quiet_libraries, write_json
from pared.cli.from_schema import Fields, Given, schema_options
from pared.cli.options import RECIPE_FILE, Overwrite
from pared.report.table import learned_from
from pared.schema.presets import summary_of
from pared.schema.recipe import Recipe

if TYPE_CHECKING:
    from pared.schema.manifest import Manifest

RUINED = 100  # times the perplexity of the dense model


@schema_options
def compress(
    given: Annotated[Given[Recipe], Fields(Recipe, file=RECIPE_FILE)],
    overwrite: Overwrite = False,
    json_file: JsonFile = None,
) -> None:
    """Compress a model and write it as an ordinary Hugging Face folder, checked by reloading."""
    with errors():
        quiet_libraries()
        recipe = given.merged()
        from pared.engine.early import require_job

        require_job(recipe, overwrite)
        from pared.entrypoints.compress import run

        outcome = run(recipe, overwrite, ConsoleProgress())
        print_manifest(outcome.manifest, str(outcome.folder))
        write_json(json_file, {"folder": str(outcome.folder), **outcome.manifest.model_dump(mode="json")})


def print_manifest(manifest: "Manifest", folder: str) -> None:
    """Print the table of a finished compression and where it lies."""
    from pared.report import comparison

    print_rows(manifest.model["name"], comparison(manifest))
    if manifest.perplexity_after is not None and manifest.evaluation:
        on = manifest.evaluation
        stand_in = "; only a stand-in for a real corpus" if on["stand_in"] else ""
        share = learned_from(manifest)
        seen = f"; {share:.0%} of it was calibrated or trained on" if share else ""
        out.print(f"perplexity on {on['text']}: {on['windows']} windows of {on['length']} tokens{stand_in}{seen}")
        if manifest.perplexity_before and manifest.perplexity_after > RUINED * manifest.perplexity_before:
            out.print("the model is ruined: try another method, a larger keep or more samples")
    seconds = "  ".join(f"{stage} {value:.1f}" for stage, value in manifest.seconds.items())
    out.print(f"seconds by stage: {seconds}")
    if manifest.preset and (changed := summary_of(manifest.preset)):
        out.print(changed)
    if manifest.plan.missed:
        out.print(manifest.plan.missed)
    if manifest.damping:
        read = manifest.calibration
        tokens = read["windows"] * read["length"] if read is not None else 0
        out.print(
            f"{len(manifest.damping)} layers read too little to tell all their inputs apart ({tokens:,} tokens of "
            "calibration text): raise --samples or --length"
        )  # fmt: skip
    out.print(f"self-check: reloaded, largest relative difference {manifest.self_check:.2g}")
    out.print(f"folder: {folder}")
