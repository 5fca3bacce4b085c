"""``pared export``: any model that has a name, in a form that needs nothing of pared."""

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
    made: Annotated[Path, typer.Option("--out", help="The folder to make, or the .gguf file.")],
    to: Annotated[
        str,
        typer.Option(
            help="dense: a folder of plain weights, factors multiplied out, zeros written out. "
            "gguf: one file for llama.cpp, with tokenizer and chat template. "
            "onnx: a folder with a graph in float32 for onnxruntime, cache and factors in it."
        ),
    ] = "dense",
    dtype: Annotated[
        str, typer.Option(help="What a folder stores; auto keeps what is stored, bfloat16 for a quantised .gguf file.")
    ] = "auto",
    quantize: Annotated[
        str, typer.Option(help="What a .gguf file stores: f32, f16, bf16, q8_0; auto the dtype of the model.")
    ] = "auto",
    overwrite: Overwrite = False,
) -> None:
    """Write a model as a plain folder, a GGUF file or an ONNX graph."""
    with errors():
        quiet_libraries()
        require_export(model, made, to, dtype, quantize)
        from pared.entrypoints.export import export_as

        PRINTED[to](export_as(to, model, made, dtype, quantize, overwrite), made)


def print_exported(exported: "Written", folder: Path) -> None:
    """Print what was written as plain weights, and that it was checked."""
    out.print(f"self-check: reloaded, largest relative difference {exported.self_check:.2g}")
    out.print(f"folder: {folder}  ({exported.bytes_on_disk:,} bytes of weights)")


def print_exported_file(exported: "Written", file: Path) -> None:
    """Print what was written as one file, and that it was compared."""
    out.print(f"read back: every number compared, largest relative difference {exported.self_check:.2g}")
    out.print(f"file: {file}  ({exported.bytes_on_disk:,} bytes)")


def print_exported_graph(exported: "Written", folder: Path) -> None:
    """Print what was written as a graph, and that it was run."""
    out.print(f"self-check: run in onnxruntime, largest relative difference {exported.self_check:.2g}")
    out.print(f"folder: {folder}  ({exported.bytes_on_disk:,} bytes of graph and weights)")


PRINTED = {"dense": print_exported, "gguf": print_exported_file, "onnx": print_exported_graph}  # by form
