"""``pared verify``: is a folder what was written, and does its model compute what it did?"""

from pathlib import Path
from typing import Annotated

import typer

from pared.cli.console import JsonFile, errors, out, quiet_libraries, write_json
from pared.cli.options import Streaming
from pared.entrypoints.folder import verify as check


def verify(
    folder: Annotated[Path, typer.Argument(help="A folder that pared made.")],
    take_over: Annotated[
        bool, typer.Option("--record", help="Record the files as they are now, such as a card you edited; then check.")
    ] = False,
    stream: Streaming = "auto",
    json_file: JsonFile = None,
) -> None:
    """Compare a folder's files with their recorded SHA-256, and its model's outputs with those recorded."""
    with errors():
        quiet_libraries()
        difference = check(folder, take_over, stream)
        out.print(f"{folder}: ok, largest relative difference {difference:.2g}")
        write_json(json_file, {"folder": str(folder), "difference": difference})
