"""``pared convert``: the same weights stored in another way."""

from pathlib import Path
from typing import Annotated

import typer

from pared.cli.console import JsonFile, errors, out, quiet_libraries, write_json
from pared.cli.export import print_exported
from pared.cli.options import Overwrite
from pared.entrypoints.folder import require_compressed
from pared.errors import ParedError


def convert(
    folder: Annotated[Path, typer.Argument(help="A folder that pared made.")],
    out_folder: Annotated[Path, typer.Option("--out", help="The folder to make.")],
    pivot: Annotated[
        bool | None,
        typer.Option(
            "--pivot/--no-pivot", help="Store rank k by k of its own rows, or as two factors again. [default: pivot]"
        ),
    ] = None,
    dense: Annotated[
        bool, typer.Option("--dense", help="Plain weights that load without pared; what `pared export` makes.")
    ] = False,
    overwrite: Overwrite = False,
    json_file: JsonFile = None,
) -> None:
    """Store a folder in another form: pivoted (k² fewer parameters, no loss), as two factors, or as plain weights."""
    with errors():
        quiet_libraries()
        if dense and pivot is not None:
            raise ParedError(f"--dense and --{'' if pivot else 'no-'}pivot are two ways to store one folder; give one")
        (_to_dense if dense else _to_low_rank)(folder, out_folder, pivot is not False, overwrite, json_file)


def _to_dense(folder: Path, out_folder: Path, _: bool, overwrite: bool, json_file: Path | None) -> None:
    before = require_compressed(folder)
    from pared.entrypoints.export import export_dense

    exported = export_dense(str(folder), out_folder, overwrite=overwrite)
    _print_sizes("bytes on disk", before, exported.bytes_on_disk)
    print_exported(exported, out_folder)
    write_json(json_file, {"folder": str(out_folder), "bytes_before": before, **exported._asdict()})


def _to_low_rank(folder: Path, out_folder: Path, pivot: bool, overwrite: bool, json_file: Path | None) -> None:
    from pared.schema.manifest import Manifest

    before = Manifest.read(folder)
    from pared.entrypoints.convert import convert as store

    after = store(folder, out_folder, pivot, overwrite)
    for what, old, new in (
        ("target parameters", before.plan.after.covered_parameters, after.plan.after.covered_parameters),
        ("whole-model parameters", before.plan.after.model_parameters, after.plan.after.model_parameters),
        ("bytes on disk", before.bytes_on_disk, after.bytes_on_disk),
    ):
        _print_sizes(what, old, new)
    out.print(f"self-check: reloaded, largest relative difference {after.self_check:.2g}")
    out.print(f"folder: {out_folder}")
    write_json(json_file, {"folder": str(out_folder), **after.model_dump(mode="json")})


def _print_sizes(what: str, old: int, new: int) -> None:
    out.print(f"{what}: {old:,} -> {new:,} ({new / old:.1%})")
