"""``pared compress``: a model in, a smaller folder out."""

from typing import TYPE_CHECKING, Annotated

from pared.cli.console import ConsoleProgress, JsonFile, errors, print_result, quiet_libraries, write_json
from pared.cli.from_schema import Fields, Given, schema_options
from pared.cli.options import RECIPE_FILE, Overwrite, Resume
from pared.entrypoints.checks import require_compression
from pared.report.results import compressed_table
from pared.schema.recipe import Recipe

if TYPE_CHECKING:
    from pared.schema.manifest import Manifest


@schema_options
def compress(
    given: Annotated[Given[Recipe], Fields(Recipe, file=RECIPE_FILE)],
    overwrite: Overwrite = False,
    resume: Resume = None,
    json_file: JsonFile = None,
) -> None:
    """Compress a model and write it as an ordinary Hugging Face folder, checked by reloading."""
    with errors("no partial output is left, and --resume continues after the last finished block"):
        quiet_libraries()
        recipe = given.merged()
        require_compression(recipe, overwrite, resume)
        from pared.entrypoints.run import run

        outcome = run(recipe, overwrite, ConsoleProgress(), resume=resume)
        if not outcome.is_first:
            return
        print_manifest(outcome.manifest, str(outcome.folder))
        write_json(json_file, {"folder": str(outcome.folder), **outcome.manifest.model_dump(mode="json")})


def print_manifest(manifest: "Manifest", folder: str) -> None:
    """Print the table of a finished compression and where it lies."""
    print_result(compressed_table(manifest, folder))
