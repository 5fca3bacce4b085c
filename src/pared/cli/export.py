"""``pared export``: any model that has a name, as a folder that needs nothing of pared."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pared.cli.console import errors, out, quiet_libraries
from pared.cli.options import Overwrite
from pared.entrypoints.checks import require_export

if TYPE_CHECKING:
    from pared.entrypoints.publish import Written


def export(
    model: Annotated[str, typer.Argument(help="A folder that pared made, or any named model.")],
    out_folder: Annotated[Path, typer.Option("--out", help="The folder to make.")],
    to: Annotated[str, typer.Option(help="dense: plain weights, factors multiplied out, zeros written out.")] = "dense",
    dtype: Annotated[
        str, typer.Option(help="What to store; auto keeps what is stored, bfloat16 for a quantised .gguf file.")
    ] = "auto",
    overwrite: Overwrite = False,
) -> None:
    """Write a model as a plain folder."""
    with errors():
        quiet_libraries()
        require_export(model, to)
        from pared.entrypoints.export import export_dense

        print_exported(export_dense(model, out_folder, dtype, overwrite), out_folder)


def print_exported(exported: "Written", folder: Path) -> None:
    """Print what was written as plain weights, and that it was checked."""
    out.print(f"self-check: reloaded, largest relative difference {exported.self_check:.2g}")
    out.print(f"folder: {folder}  ({exported.bytes_on_disk:,} bytes of weights)")
