"""``pared verify``: does a folder still answer as the model that was saved in it?"""

from pathlib import Path
from typing import Annotated

import typer

from pared.cli.console import JsonFile, errors, out, quiet_libraries, write_json
from pared.entrypoints.folder import verify as check
from pared.memory import Stream


def verify(
    folder: Annotated[Path, typer.Argument(help="A folder that pared made.")],
    take_over: Annotated[
        bool, typer.Option("--record", help="Take over files as they are now, such as a card you edited; then check.")
    ] = False,
    stream: Annotated[
        Stream, typer.Option(help="Read the model block by block; auto does where memory does not hold it.")
    ] = "auto",
    json_file: JsonFile = None,
) -> None:
    """Compare a folder's files with their recorded SHA-256, and what it answers with what was recorded before."""
    with errors():
        quiet_libraries()
        difference = check(folder, take_over, stream)
        out.print(f"{folder}: ok, largest relative difference {difference:.2g}")
        write_json(json_file, {"folder": str(folder), "difference": difference})
