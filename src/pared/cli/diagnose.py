"""``pared diagnose``: what a method's order of directions is worth."""

from dataclasses import asdict
from typing import Annotated

import typer
from rich.table import Table

from pared.cli import options
from pared.cli.console import ConsoleProgress, JsonFile, errors, out, quiet_libraries, write_json
from pared.engine.early import require_model, require_possible, require_suited
from pared.engine.spec import low_rank_of as require_low_rank

diagnose = typer.Typer(help="Look into what a method does to a model.", no_args_is_help=True, rich_markup_mode=None)


@diagnose.callback()
def _diagnose() -> None:
    """Keep the command's name although it is the only one."""


@diagnose.command("rank-groups")
def rank_groups(
    model: options.Model = None,
    method: options.Method = None,
    groups: Annotated[int, typer.Option(help="Groups that the directions of every weight are split into.")] = 10,
    skip: options.Skip = None,
    blocks: options.Blocks = None,
    option: options.MethodOptions = None,
    data: options.Data = None,
    samples: options.Samples = None,
    length: options.Length = None,
    seed: options.Seed = None,
    sampling: options.Sampling = None,
    calibration_dtype: options.CalibrationDtype = None,
    eval_data: Annotated[
        str | None,
        typer.Option(
            "--eval",
            help="Text, or labelled examples for a classifier (glue:cola:dev, ner:wnut17:dev, file:PATH), that quality "
            "is measured on. [default: the held-out part of the calibration data]",
        ),
    ] = None,
    eval_length: options.EvalLength = None,
    eval_windows: Annotated[
        int | None, typer.Option(help="Evaluation windows, or examples. [default: 20 windows, 200 examples]")
    ] = None,
    dtype: options.Dtype = None,
    device: options.Device = None,
    json_file: JsonFile = None,
) -> None:
    """Take one group of every weight's directions out at a time and measure the model (FWSVD's brute-force attack)."""
    with errors():
        quiet_libraries()
        asked = options.recipe_of(
            None,
            {
                "model": model,
                "method": method,
                "skip": skip,
                "blocks": blocks,
                "options": options.named_values(option),
                "calibration.text": data,
                "calibration.samples": samples,
                "calibration.length": length,
                "calibration.seed": seed,
                "calibration.sampling": sampling,
                "calibration.dtype": calibration_dtype,
                "evaluation.text": eval_data,
                "evaluation.length": eval_length,
                "evaluation.windows": eval_windows,
                "dtype": dtype,
                "device": device,
            },
        )
        require_low_rank(asked)
        require_possible(asked)
        source = require_model(asked)
        require_suited(source.config(), asked, source.name)
        from pared.entrypoints.rank_groups import rank_groups as measure

        tokenizer = source.tokenizer()
        loaded = source.load(asked.dtype).to(asked.device)
        result = measure(loaded, tokenizer, asked, groups, ConsoleProgress())
        table = Table(header_style="bold", title=f"{asked.model}  {asked.method}", title_justify="left")
        qualities = (column for name in result.before for column in (name, "change"))
        for column in ("group", "directions", "error", *qualities):
            table.add_column(column, justify="right")
        table.add_row("none", "", "0", *(text for value in result.before.values() for text in (f"{value:.6g}", "")))
        for group in result.groups:
            share = f"{(group.number - 1) / groups:.0%}-{group.number / groups:.0%}"
            quality = (
                text
                for name, value in group.quality.items()
                for text in (f"{value:.6g}", f"{value - result.before[name]:+.3g}")
            )
            table.add_row(str(group.number), share, f"{group.error:.4f}", *quality)
        out.print(table)
        if result.untouched:
            out.print(f"{len(result.untouched)} sites left whole, the first is {result.untouched[0]}", markup=False)
        on = result.evaluation
        out.print(f"measured on {on['text']}: {on['windows']} x {on['length']} tokens", markup=False)
        write_json(json_file, {"model": asked.model, "recipe": asked.model_dump(mode="json"), **asdict(result)})
