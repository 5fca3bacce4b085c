"""``pared push``: a checked folder to the Hub."""

from pathlib import Path
from typing import Annotated

import typer

from pared.cli.console import JsonFile, errors, print_result, quiet_libraries, write_json
from pared.entrypoints.push import push as upload


def push(
    folder: Annotated[Path, typer.Argument(help="A folder that pared made.")],
    repository: Annotated[str, typer.Argument(metavar="REPO", help="Its id on the Hub, owner/name.")],
    private: Annotated[bool, typer.Option("--private", help="Make the repository private.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check, and print what would be uploaded.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is in the repository.")] = False,
    json_file: JsonFile = None,
) -> None:
    """Check a folder and upload the files that it lists to the Hugging Face Hub."""
    with errors("interrupted; the same command continues the upload"):
        quiet_libraries()
        pushed = upload(folder, repository, private, dry_run, overwrite)
        print_result(pushed.table())
        write_json(json_file, pushed.describe())
