"""``pared bench``: speed and memory of a model, alone or against another."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from pared.cli.console import ConsoleProgress, JsonFile, errors, out, quiet_libraries, write_json
from pared.environment import device_of, require_device, require_dtype
from pared.errors import ParedError
from pared.evaluation.speed import Settings, parse_case, preset
from pared.models.source import find_model

if TYPE_CHECKING:
    from pared.evaluation.speed import Bench, Timed

SIZES: dict[str, Callable[[dict[str, Any]], str]] = {
    "parameters": lambda model: f"{model['parameters']:,}",
    "bytes of weights": lambda model: f"{model['bytes']:,} ({model['dtype']})",
    "bytes on disk": lambda model: f"{model['bytes_on_disk']:,}" if model["bytes_on_disk"] else "-",
    "FLOPs a token, without attention": lambda model: f"{model['flops_per_token']:,}",
    "memory in use": lambda model: _mib(model["memory"].get("resident")),
    "peak memory": lambda model: _mib(model["memory"].get("peak")),
}


def bench(
    model: Annotated[str, typer.Argument(help="A folder that pared made, or any named model.")],
    against: Annotated[str | None, typer.Option(help="Another model, timed in turns with the first.")] = None,
    case: Annotated[
        list[str] | None,
        typer.Option(help="What to time: prefill:4x512, decode:1x64+32, forward:512x32; repeatable."),
    ] = None,
    preset_name: Annotated[
        str, typer.Option("--preset", help="Cases by name: default, basis-sharing, basel.")
    ] = "default",
    repeats: Annotated[int, typer.Option(help="Measured runs of every case and model.")] = 5,
    threads: Annotated[int, typer.Option(help="Of a CPU; more than one distorts ratios on shared machines.")] = 1,
    dtype: Annotated[str, typer.Option(help="What the models are loaded in; auto keeps what is stored.")] = "auto",
    device: Annotated[str, typer.Option(help="Where they run.")] = "cpu",
    json_file: JsonFile = None,
) -> None:
    """Measure tokens per second, time to the first token, memory and sizes."""
    with errors():
        quiet_libraries()
        require_dtype(dtype)
        if repeats < 1 or threads < 1:
            raise ParedError(f"{repeats} repeats on {threads} threads: expected at least 1 of each")
        cases = tuple(map(parse_case, case)) if case else preset(preset_name)
        settings = Settings(cases, repeats, threads, dtype, device)
        names = [model] if against is None else [model, against]
        for name in names:
            find_model(name)
        require_device(device)
        device_of(device)
        from pared.evaluation.speed import bench as measure

        with ConsoleProgress().stage("bench", len(cases) * repeats * len(names), "run") as advance:
            result = measure(names, settings, advance)
        print_bench(result)
        write_json(json_file, {"settings": settings.to_json(), "models": result.models,
                               "timed": [as_json(timed) for timed in result.timed]})  # fmt: skip


def print_bench(result: "Bench") -> None:
    """Print sizes and speeds side by side."""
    sizes = Table(header_style="bold")
    for column in ("", *(model["name"] for model in result.models)):
        sizes.add_column(column, justify="right" if column else "left")
    for label, told in SIZES.items():
        sizes.add_row(label, *(told(model) for model in result.models))
    out.print(sizes)
    speeds = Table(header_style="bold")
    names = [model["name"] for model in result.models]
    for column in ("case", *(f"{name}, tokens/s" for name in names), "first token", "times as fast", "ideal"):
        speeds.add_column(column, justify="left" if column == "case" else "right")
    for timed in result.timed:
        first = " / ".join(f"{statistics.median(own):.3f} s" for own in timed.first_token if own)
        ratio = _spread(timed.ratios) if timed.ratios else ""
        rates = (_spread(timed.rates(index), 1) for index in range(len(names)))
        speeds.add_row(str(timed.case), *rates, first, ratio, f"{timed.ideal:.2f}" if timed.ideal else "")
    out.print(speeds)


def as_json(timed: "Timed") -> dict[str, Any]:
    """Return one case with its medians."""
    medians = {"tokens_per_second": [timed.tokens_per_second(index) for index in range(len(timed.seconds))]}
    return {**asdict(timed), **medians, "ratios": timed.ratios}


def _spread(values: Sequence[float], digits: int = 2) -> str:
    median, least, most = (f"{value:,.{digits}f}" for value in (statistics.median(values), min(values), max(values)))
    return f"{median} ({least} to {most})"


def _mib(count: int | None) -> str:
    return "-" if count is None else f"{count / 2**20:,.0f} MiB"
