"""``pared bench``: speed and memory of a model, alone or against another."""

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pared.cli.console import ConsoleProgress, JsonFile, errors, print_result, quiet_libraries, write_json
from pared.entrypoints.bench import bench as measure
from pared.entrypoints.bench import draft as measure_draft
from pared.entrypoints.bench import draft_settings_of, settings_of
from pared.tables import Table

if TYPE_CHECKING:
    from pared.entrypoints.bench import Bench, Drafted, Timed
    from pared.evaluation.speed import Settings

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
    draft: Annotated[
        bool,
        typer.Option(
            "--draft",
            help="Have the first propose tokens that the other checks (speculative decoding), against the other alone.",
        ),
    ] = False,
    draft_tokens: Annotated[int, typer.Option(help="Proposed before every check.")] = 5,
    text: Annotated[str, typer.Option(help="What prompts are cut from, with --draft.")] = "embedded",
    case: Annotated[
        list[str] | None,
        typer.Option(help="What to time: prefill:4x512, decode:1x64+32, forward:512x32; repeatable."),
    ] = None,
    preset_name: Annotated[
        str, typer.Option("--preset", help="Cases by name: default, basis-sharing, basel, draft.")
    ] = "default",
    repeats: Annotated[int, typer.Option(help="Measured runs of every case and model; with --draft prompts.")] = 5,
    threads: Annotated[int, typer.Option(help="Of a CPU; more than one distorts ratios on shared machines.")] = 1,
    dtype: Annotated[str, typer.Option(help="What the models are loaded in; auto keeps what is stored.")] = "auto",
    device: Annotated[str, typer.Option(help="Where they run; auto takes the GPU (CUDA) where there is one.")] = "auto",
    json_file: JsonFile = None,
) -> None:
    """Measure tokens per second, time to the first token, memory and sizes."""
    with errors():
        quiet_libraries()
        names = [model] if against is None else [model, against]
        timed_on = (names, case or (), preset_name, repeats, threads, dtype, device)
        if draft:
            _bench_draft(names, draft_settings_of(*timed_on, text, draft_tokens), text, draft_tokens, json_file)
            return
        settings = settings_of(*timed_on)
        result = measure(names, settings, ConsoleProgress())
        for table in tables(result):
            print_result(table)
        write_json(json_file, {"settings": settings.to_json(), "models": result.models,
                               "timed": [as_json(timed) for timed in result.timed]})  # fmt: skip


def _bench_draft(names: list[str], settings: "Settings", text: str, draft_tokens: int, json_file: Path | None) -> None:
    results = measure_draft(names, settings, text, draft_tokens, ConsoleProgress())
    print_result(draft_table(settings, results))
    cases = [{**asdict(result), **_draft_figures(result)} for result in results]
    write_json(json_file, {"settings": settings.to_json(), "draft": names[0], "against": names[1], "text": text,
                           "drafted": cases})  # fmt: skip


def draft_table(settings: "Settings", results: "Sequence[Drafted]") -> Table:
    """Return what a draft is worth, case by case."""
    columns = (
        "case",
        "tokens/s alone",
        "with the draft",
        "times as fast",
        "ideal",
        "accepted",
        "tokens a pass",
        "same text",
    )
    rows = []
    for case, result in zip(settings.cases, results, strict=True):
        alone, helped = result.tokens_per_second()
        same = f"{result.equal_prompts} of {len(result.runs)} prompts"
        rows.append((str(case), f"{alone:,.1f}", f"{helped:,.1f}", _spread(result.ratios), f"{result.ideal:.2f}",
                     f"{result.acceptance:.1%}", f"{result.tokens_per_pass:.2f}", same))  # fmt: skip
    return Table("", columns, rows)


def _draft_figures(result: "Drafted") -> dict[str, Any]:
    return {"acceptance": result.acceptance, "tokens_per_pass": result.tokens_per_pass, "ratios": result.ratios,
            "ideal": result.ideal, "equal_prompts": result.equal_prompts}  # fmt: skip


def tables(result: "Bench") -> Iterator[Table]:
    """Yield sizes and speeds together."""
    names = [str(model["name"]) for model in result.models]
    sizes = [(label, *(told(model) for model in result.models)) for label, told in SIZES.items()]
    yield Table("", ("", *names), sizes)
    columns = ("case", *(f"{name}, tokens/s" for name in names), "first token", "times as fast", "ideal")
    rows = []
    for timed in result.timed:
        first = " / ".join(f"{statistics.median(own):.3f} s" for own in timed.first_token if own)
        rates = (_spread(timed.rates(index), 1) for index in range(len(names)))
        ratio, ideal = _spread(timed.ratios) if timed.ratios else "", f"{timed.ideal:.2f}" if timed.ideal else ""
        rows.append((str(timed.case), *rates, first, ratio, ideal))
    yield Table("", columns, rows)


def as_json(timed: "Timed") -> dict[str, Any]:
    """Return one case with its medians."""
    medians = {"tokens_per_second": [timed.tokens_per_second(index) for index in range(len(timed.seconds))]}
    return {**asdict(timed), **medians, "ratios": timed.ratios}


def _spread(values: Sequence[float], digits: int = 2) -> str:
    median, least, most = (f"{value:,.{digits}f}" for value in (statistics.median(values), min(values), max(values)))
    return f"{median} ({least} to {most})"


def _mib(count: int | None) -> str:
    return "-" if count is None else f"{count / 2**20:,.0f} MiB"
