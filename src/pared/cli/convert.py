"""``pared convert``: the same weights stored in another way."""

from pathlib import Path
from typing import Annotated

import typer

from pared.checkpoint import Manifest
from pared.checkpoint import convert as store
from pared.cli.console import JsonFile, errors, out, quiet_libraries, write_json
from pared.cli.options import Overwrite
from pared.report import model_card


def convert(
    folder: Annotated[Path, typer.Argument(help="A folder that pared made.")],
    out_folder: Annotated[Path, typer.Option("--out", help="The folder to make.")],
    pivot: Annotated[
        bool, typer.Option("--pivot/--no-pivot", help="Store rank k by k of its own rows, or as two factors again.")
    ] = True,
    overwrite: Overwrite = False,
    json_file: JsonFile = None,
) -> None:
    """Store a low-rank model without loss in k² fewer numbers per weight, or as two factors again."""
    with errors():
        quiet_libraries()
        before = Manifest.read(folder)
        after = store(folder, out_folder, pivot, overwrite, model_card)
        for what, old, new in (
            ("covered parameters", before.plan.after.covered_parameters, after.plan.after.covered_parameters),
            ("whole-model parameters", before.plan.after.model_parameters, after.plan.after.model_parameters),
            ("bytes on disk", before.bytes_on_disk, after.bytes_on_disk),
        ):
            out.print(f"{what}: {old:,} -> {new:,} ({new / old:.1%})", markup=False)
        out.print(f"self-check: reloaded, largest relative difference {after.self_check:.2g}", markup=False)
        out.print(f"folder: {out_folder}", markup=False)
        write_json(json_file, {"folder": str(out_folder), **after.model_dump(mode="json")})
