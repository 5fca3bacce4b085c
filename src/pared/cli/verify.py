"""``pared verify``: does a folder still answer as the model that was saved in it?"""

from pathlib import Path
from typing import Annotated

import typer

from pared.cli.console import JsonFile, errors, out, quiet_libraries, write_json


def verify(
    folder: Annotated[Path, typer.Argument(help="A folder that pared made.")], json_file: JsonFile = None
) -> None:
    """Load a folder and compare its outputs with those recorded before it was saved."""
    with errors():
        quiet_libraries()
        from pared.checkpoint import Manifest

        Manifest.read(folder)  # before anything that takes long to import
        from pared.checkpoint import verify as check

        difference = check(folder)
        out.print(f"{folder}: ok, largest relative difference {difference:.2g}", markup=False)
        write_json(json_file, {"folder": str(folder), "difference": difference})
