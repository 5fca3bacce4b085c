"""``pared tune``: a compressed model in, the same one trained out."""

from typing import TYPE_CHECKING, Annotated

from pared.cli.console import ConsoleProgress, JsonFile, errors, out, quiet_libraries, write_json
from pared.cli.from_schema import Fields, Given, schema_options
from pared.cli.options import Overwrite, Resume
from pared.entrypoints.checks import require_training
from pared.report.results import trained_lines, training_lines
from pared.schema.training import TrainingConfig

if TYPE_CHECKING:
    from pared.schema.manifest import Manifest, Training


@schema_options
def tune(
    given: Annotated[
        Given[TrainingConfig], Fields(TrainingConfig, file="YAML file of a training; options given here win over it.")
    ],
    overwrite: Overwrite = False,
    resume: Resume = None,
    json_file: JsonFile = None,
) -> None:
    """Train a compressed model, keeping its ranks and zeros; or, with basel, compress a dense one for a task."""
    with errors("--resume continues from the last checkpoint, if there is one"):
        quiet_libraries()
        config = given.merged()
        require_training(config, overwrite)
        from pared.entrypoints.train import tune as run

        made = run(config, overwrite, ConsoleProgress(), resume=resume)
        if made.is_first:
            print_trained(made.manifest, str(made.folder))
            write_json(json_file, {"folder": str(made.folder), **made.manifest.model_dump(mode="json")})


def print_trained(manifest: "Manifest", folder: str) -> None:
    """Print what a training changed and where it lies."""
    for line in trained_lines(manifest, folder):
        out.print(line)


def print_training(training: "Training") -> None:
    """Print how a training went."""
    for line in training_lines(training):
        out.print(line)
