"""Options that are of a command and of no recipe, and the fields of recipes that several commands take."""

from typing import Annotated

import typer

from pared.memory import Stream

RECIPE_FILE = "YAML file; options given here win over it."
# Of a recipe: what is compressed and how, as far as it is known without a text, and how a text is read.
SHAPES = ("model", "skip", "blocks", "options", "dtype")
PLANNED = (
    *SHAPES, "preset", "method", "keep", "keep_bytes", "target_bytes", "rank_fraction", "sparsity", "pattern",
    "allocation", "structures", "multiple_of", "storage", "elastic", "quantize",
)  # fmt: skip
# What else the time, the memory and the disk of a compression depend on.
COSTED = (
    "statistics", "refit", "dense_path", "refine", "rounding", "device", "stream", "activation_memory", "calibrate_on",
    "calibration", "evaluation",
)  # fmt: skip
Streaming = Annotated[
    Stream, typer.Option("--stream", help="Read the model block by block; auto does where memory does not hold it.")
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the output folder if it is there.")]
Resume = Annotated[
    bool | None,
    typer.Option(
        "--resume/--restart",
        show_default=False,
        help="Continue what a killed run of the same command left, to the same result; or remove it, and start over. "
        "[default: refuse to do either]",
    ),
]
