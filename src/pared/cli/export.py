"""``pared export``: any model that has a name, as a folder that needs nothing of pared."""

from pathlib import Path
from typing import Annotated

import typer

from pared.checkpoint import export_dense
from pared.cli.console import errors, out, quiet_libraries
from pared.cli.options import Overwrite
from pared.errors import ParedError
from pared.names import did_you_mean

FORMS = ("dense",)


def export(
    model: Annotated[str, typer.Argument(help="A folder that pared made, or any named model.")],
    out_folder: Annotated[Path, typer.Option("--out", help="The folder to make.")],
    to: Annotated[str, typer.Option(help="dense: plain weights, compressed modules multiplied out.")] = "dense",
    dtype: Annotated[str, typer.Option(help="What to store; auto keeps what is stored.")] = "auto",
    overwrite: Overwrite = False,
) -> None:
    """Write a model as a plain folder."""
    with errors():
        quiet_libraries()
        if to not in FORMS:
            raise ParedError(f"unknown form {to!r}; {did_you_mean(to, FORMS)}")
        size = export_dense(model, out_folder, dtype, overwrite)
        out.print(f"folder: {out_folder}  ({size:,} bytes of weights)", markup=False)
