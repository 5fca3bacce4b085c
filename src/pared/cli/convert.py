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
    quantize: Annotated[
        str | None, typer.Option(help="Round every target weight to int8 or int4; what `pared compress` rounds better.")
    ] = None,
    overwrite: Overwrite = False,
    json_file: JsonFile = None,
) -> None:
    """Store a folder in another form: pivoted (k² fewer parameters, no loss), two factors, plain, or in few bits."""
    with errors():
        quiet_libraries()
        flags = {"--dense": dense, "--pivot": pivot is True, "--no-pivot": pivot is False, "--quantize": quantize}
        if len(ways := [flag for flag, given in flags.items() if given]) > 1:
            raise ParedError(f"{ways[0]} and {ways[1]} are two ways to store one folder; give one")
        if dense:
            _to_dense(folder, out_folder, overwrite, json_file)
        else:
            _stored_anew(folder, out_folder, pivot is not False, quantize, overwrite, json_file)


def _to_dense(folder: Path, out_folder: Path, overwrite: bool, json_file: Path | None) -> None:
    before = require_compressed(folder)
    from pared.entrypoints.export import export_dense

    exported = export_dense(str(folder), out_folder, overwrite=overwrite)
    _print_sizes("bytes on disk", before, exported.bytes_on_disk)
    print_exported(exported, out_folder)
    write_json(json_file, {"folder": str(out_folder), "bytes_before": before, **exported._asdict()})


def _stored_anew(
    folder: Path, out_folder: Path, pivot: bool, quantize: str | None, overwrite: bool, json_file: Path | None
) -> None:
    from pared.schema.manifest import Manifest

    before = Manifest.read(folder)
    from pared.entrypoints.convert import convert as store

    after = store(folder, out_folder, pivot, overwrite, quantize=quantize)
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
