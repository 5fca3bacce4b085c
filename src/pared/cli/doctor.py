"""``pared doctor``: what can be done here, and why a folder would load wrongly."""

from pathlib import Path
from typing import Annotated

import typer

from pared.cli.console import JsonFile, errors, print_result, quiet_libraries, write_json


def doctor(
    folder: Annotated[
        Path | None, typer.Argument(help="A folder of a model; this environment alone without it.", show_default=False)
    ] = None,
    json_file: JsonFile = None,
) -> None:
    """Say what this machine can do, and how it would load a folder; exit code 1 where it would load it wrongly."""
    with errors():
        quiet_libraries()
        from pared.entrypoints.doctor import examine

        found = examine(folder)
        for table in found.tables():
            print_result(table)
        write_json(json_file, found.describe())
        if found.wrong:
            raise typer.Exit(1)
