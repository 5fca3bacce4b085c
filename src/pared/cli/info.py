"""``pared info``: what is in a folder."""

from pathlib import Path
from typing import Annotated

import typer

from pared.cli.compress import print_manifest
from pared.cli.console import JsonFile, errors, out, print_result, quiet_libraries, write_json
from pared.cli.tune import print_training
from pared.report.sites import kinds_table, layers_table
from pared.schema.manifest import Manifest


def info(
    folder: Annotated[Path, typer.Argument(help="A folder that pared made.")],
    full: Annotated[bool, typer.Option("--full", help="List every layer by name, not every kind of layer.")] = False,
    json_file: JsonFile = None,
) -> None:
    """Print how a folder was made, its sizes and its ranks."""
    with errors():
        quiet_libraries()
        manifest = Manifest.read(folder)
        print_manifest(manifest, str(folder))
        print_result(layers_table(manifest.plan) if full else kinds_table(manifest.plan))
        for training in manifest.training:
            print_training(training)
        versions = "  ".join(f"{name} {number}" for name, number in manifest.versions.items())
        out.print(f"made with {versions}")
        write_json(json_file, manifest.model_dump(mode="json"))
