"""``pared slice``: a smaller size out of a folder of every size."""

from pathlib import Path
from typing import Annotated

import typer

from pared.cli.compress import print_manifest
from pared.cli.console import ConsoleProgress, JsonFile, errors, quiet_libraries, write_json
from pared.cli.options import Overwrite
from pared.entrypoints.folder import require_elastic


def slice(
    folder: Annotated[Path, typer.Argument(help="A folder that `pared compress --elastic` made.")],
    keep: Annotated[
        float, typer.Option(help="Fraction of the parameters of the target modules that stays, at most the folder's.")
    ],
    out_folder: Annotated[Path, typer.Option("--out", help="The folder to make.")],
    overwrite: Overwrite = False,
    json_file: JsonFile = None,
) -> None:
    """Cut a smaller size out of a folder of every size, in seconds and without data, checked by reloading."""
    with errors():
        quiet_libraries()
        require_elastic(folder, keep)
        from pared.entrypoints.slice import slice as cut

        made = cut(folder, out_folder, keep, overwrite, progress=ConsoleProgress())
        print_manifest(made.manifest, str(made.folder))
        write_json(json_file, {"folder": str(made.folder), **made.manifest.model_dump(mode="json")})
