"""The options of a compression, and the recipe they make with or without a file."""

import re
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args

import typer

from pared.errors import ParedError
from pared.io.guarded import parse_yaml
from pared.schema import recipe
from pared.schema.base import read_fields
from pared.schema.presets import left_below
from pared.schema.recipe import Recipe
from pared.schema.training import Tuning

Model = Annotated[
    str | None,
    typer.Argument(help="embedded:smollm2-135m, a Hub id, a local folder, or a .gguf file.", show_default=False),
]
RecipeFile = Annotated[Path | None, typer.Option("--recipe", help="YAML file; options given here win over it.")]
Preset = Annotated[
    str | None,
    typer.Option(help="A protocol by name, which `pared presets` lists; options given beside it win and are reported."),
]
Method = Annotated[
    str | None,
    typer.Option(
        help="A name that `pared methods` lists. [default: loss-optimal; sparsegpt with --sparsity or --pattern]"
    ),
]
Keep = Annotated[
    float | None,
    typer.Option(help="Fraction of the parameters of the covered sites that stays: 0.8 removes 20%. [default: 0.8]"),
]
RankFraction = Annotated[
    float | None,
    typer.Option(help="A budget of ranks in place of --keep: this fraction of every weight's full rank (FWSVD: 0.33)."),
]
Sparsity = Annotated[
    float | None,
    typer.Option(help="For methods that prune: the fraction of zeros, 0.5 makes half of the weights zero."),
]
Pattern = Annotated[
    str | None, typer.Option(help="For methods that prune: N:M, N of every M consecutive inputs of an output stay.")
]
Skip = Annotated[
    list[str] | None, typer.Option(help="Pattern of site names to leave alone, not counted in the budget; repeatable.")
]
Blocks = Annotated[
    str | None,
    typer.Option(help="Name of the list of blocks to compress, if not the language model's: a vision tower's."),
]
Allocation = Annotated[str | None, typer.Option(help="How the budget is spread. [default: the method's own]")]
AllocationOptions = Annotated[
    list[str] | None,
    typer.Option("--allocation-option", help="Option of the allocation, NAME=VALUE; repeatable."),
]
Storage = Annotated[
    str | None,
    typer.Option(
        help="How a low-rank weight is stored: factors, pivoted (without loss, rank² fewer numbers). "
        "[default: the method's own]"
    ),
]
Refit = Annotated[
    str | None,
    typer.Option(
        help="Fit to the inputs the compressed model has: update (all at once), sequential, "
        "sequential-dense-block (SVD-LLM's released code), off. "
        "[default: the method's own]"
    ),
]
Statistics = Annotated[
    str | None,
    typer.Option(
        help="Collected on the dense model (once) or again behind the compressed blocks (sequential). "
        "[default: the method's own]"
    ),
]
DensePath = Annotated[
    str | None,
    typer.Option(
        help="Share of the dense model's own outputs in the targets of a refit and of sequential statistics, 0 to 1, "
        "or auto. [default: the method's own]"
    ),
]
MethodOptions = Annotated[
    list[str] | None,
    typer.Option("--option", help="Option of the method, NAME=VALUE; repeatable."),
]
Data = Annotated[
    str | None,
    typer.Option(
        help="Calibration text: embedded, wikitext2:train, c4:train, alpaca, file:PATH, NAME:SPLIT:FIELD. "
        "[default: embedded]"
    ),
]
Samples = Annotated[int | None, typer.Option(help="Calibration windows. [default: 256]")]
Length = Annotated[int | None, typer.Option(help="Tokens in a calibration window. [default: 2048]")]
Seed = Annotated[int | None, typer.Option(help="Seed of random offsets. [default: 0]")]
_SAMPLINGS = ", ".join(get_args(recipe.Sampling))
Sampling = Annotated[str | None, typer.Option(help=f"{_SAMPLINGS}. [default: consecutive]")]
CalibrationDtype = Annotated[
    str | None, typer.Option(help="What blocks compute in while calibrating: auto, float32, bfloat16, float16.")
]
Eval = Annotated[
    str | None,
    typer.Option(
        "--eval", help="Text to measure perplexity on, before and after; auto takes the held-out part of "
        "the calibration text; none measures nothing. [default: auto]"
    ),
]  # fmt: skip
EvalLength = Annotated[int | None, typer.Option(help="Tokens in an evaluation window. [default: 1024]")]
EvalWindows = Annotated[int | None, typer.Option(help="Evaluation windows. [default: 20]")]
Dtype = Annotated[str | None, typer.Option(help="What the model is loaded and saved in. [default: auto]")]
Device = Annotated[str | None, typer.Option(help="Where the blocks run while calibrating. [default: cpu]")]
Out = Annotated[Path | None, typer.Option(help="The folder to make.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the output folder if it is there.")]


def named_values(pairs: list[str] | None, option: str = "--option") -> dict[str, Any] | None:
    """Return ``NAME=VALUE`` pairs as a mapping: truth values, numbers and lists as YAML has them, all else as text.

    Args:
        pairs: as they were given.
        option: that they were given with, for messages.

    Raises:
        ParedError: a pair without an equals sign.
    """
    for pair in pairs or []:
        if "=" not in pair:
            raise ParedError(f"{option} {pair!r}: expected NAME=VALUE")
    return {name: _value(value) for name, _, value in (pair.partition("=") for pair in pairs or [])} or None


def _value(text: str) -> Any:
    """Return a value; a pattern such as ``*.q_proj``, which YAML takes for an alias, is text, and 1e-4 is a number."""
    try:
        found = parse_yaml(text, "option")
    except ParedError:
        return text
    if isinstance(found, str) and re.fullmatch(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+", found):
        return float(found)
    return found if isinstance(found, (bool, int, float, list)) else text


Asked = TypeVar("Asked", Recipe, Tuning)


def recipe_of(file: Path | None, given: dict[str, Any]) -> Recipe:
    """Return the recipe of a file with the options that were given laid over it; see :func:`asked_of`."""
    return asked_of(Recipe, file, given)


def asked_of(kind: type[Asked], file: Path | None, given: dict[str, Any]) -> Asked:
    """Return what a file asks for with the options that were given laid over it.

    Args:
        kind: a recipe or a tuning.
        file: that holds one, or none.
        given: options by dotted key (``calibration.samples``); None for those not given.

    Raises:
        ParedError: the file or an option is wrong.
    """
    what = kind.__name__.lower()
    fields: dict[str, Any] = {}
    if file:
        kind.load(file)  # a mistake in the file is told of the file alone
        fields = read_fields(file, what)  # what it says itself, over which options are laid, and both over a preset
    if given.get("evaluation.text") == "none":
        if any(given.get(f"evaluation.{key}") is not None for key in ("length", "windows")):
            raise ParedError("--eval none measures nothing; --eval-length and --eval-windows have no meaning with it")
        given = {key: value for key, value in given.items() if not key.startswith("evaluation.")}
        fields["evaluation"] = None
    above = {key: str(value) if isinstance(value, Path) else value
             for key, value in given.items() if value is not None and value != []}  # fmt: skip
    fields = left_below(fields, above, kind.COMMAND)
    for key, value in above.items():
        section, _, leaf = key.rpartition(".")
        target = fields
        if section:
            target = fields[section] = dict(fields.get(section) or {})
        target[leaf] = {**(target.get(leaf) or {}), **value} if isinstance(value, dict) else value
    return kind.of(fields, origin=f"{what} {file} with options" if file else "options")
