"""Perplexity of every low-rank method at every budget, on text that was calibrated on and text that was not.

    PARED_DATA=/path/to/data python benchmarks/low_rank.py                       # the grid, resuming where it stopped
    PARED_DATA=/path/to/data python benchmarks/low_rank.py --methods svd-llm --keep 0.8
    PARED_DATA=/path/to/data python benchmarks/low_rank.py --samples 16 --methods svd-llm loss-optimal
    python benchmarks/low_rank.py --render                                       # renders the page only

One JSON line a cell; a cell that is there is not measured again (delete its line to repeat it). Statistics of the dense
model are collected once for all methods and budgets and kept in the user's cache folder.
"""

import argparse
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import platformdirs
import torch

import pared
from grid import LENGTH, SAMPLES, WINDOWS, measured, plot, ratios, require_disjoint, signature
from models import source_of
from pared.calibration import BlockStatistics, saved_blocks
from pared.cli.from_schema import named_values
from pared.engine import collect
from pared.engine.spec import resolve_low_rank
from pared.lowrank import METHODS
from record import RESULTS, UNSHRUNK, append, read, table

LINES = RESULTS / "low_rank.jsonl"
PAGE = RESULTS / "low_rank.md"
PLOT = RESULTS / "low_rank.svg"
PICTURE = f"![Perplexity over keep]({PLOT.name})"
MODEL = "embedded:smollm2-135m"

# What is collected together, by the method whose option `loss` says how labels are chosen.
PASSES = {
    "forward": ("svd-llm", {"gram", "magnitude"}),
    "sampled": ("loss-optimal", {"mean_gram", "output_gradient_full"}),
    "labels": ("fwsvd", {"fisher"}),
    "channels": ("flap", {"mean", "variance", "energy", "mean_gram"}),
    "weights": ("llm-pruner", {"weight_gradient"}),
}
# The other methods read what the forward pass collects.
PASS_OF = {
    "fwsvd": "labels",
    "loss-optimal": "sampled",
    "modegpt": "channels",
    "flap": "channels",
    "wanda-sp": "channels",
    "llm-pruner": "weights",
}


def statistics(
    model_name: str, method: str, calibration: pared.Calibration, dtype: str = "auto", **drawn: float
) -> Path:
    """Return the folder with the statistics a method reads, collected if they are not there.

    Args:
        model_name: of the model.
        method: that reads them.
        calibration: on what text.
        dtype: of the model.
        drawn: options of the method that say how gradients are taken; the usual ones if there are none.
    """
    wanted = PASS_OF.get(method, "forward")
    by, names = PASSES[wanted]
    key = f"{model_name} {calibration.text} {calibration.samples}x{calibration.length} {wanted}"
    key += "" if dtype == "auto" else f" {dtype}"
    key += "".join(f" {name} {value:g}" for name, value in sorted(drawn.items()))
    folder = Path(platformdirs.user_cache_dir("pared")) / "benchmarks" / key.replace("/", "_").replace(":", "_")
    source = source_of(model_name)
    model = pared.load(source, dtype=dtype)
    if len(list(folder.glob("block-*.safetensors"))) < model.config.num_hidden_layers:
        start = time.perf_counter()
        recipe = pared.Recipe(method=by, calibration=calibration, options=drawn)
        collect(model, pared.load_tokenizer(source), recipe, frozenset(names), folder)
        print(f"collected {', '.join(sorted(names))} in {time.perf_counter() - start:.0f} s", flush=True)
    return folder


def measure(model_name: str, recipe: pared.Recipe | None) -> dict[str, Any]:
    """Compress the model one way (or not at all) and measure it on every text."""
    model, tokenizer = pared.load(source_of(model_name)), pared.load_tokenizer(source_of(model_name))
    row: dict[str, Any] = {"model": model_name, "method": "dense", "keep": 1.0}
    if recipe is not None:
        asked = recipe.calibration
        row |= {"method": recipe.method, "keep": recipe.keep, "text": asked.text, "samples": asked.samples}

        def collected() -> Iterator[BlockStatistics]:
            return saved_blocks(statistics(model_name, recipe.method, asked))

        spec = resolve_low_rank(recipe)
        names = PASSES[PASS_OF.get(recipe.method, "forward")][1]
        there = spec.gradients <= names
        start = time.perf_counter()
        result = pared.compress(model, tokenizer, recipe, collected=collected if there else None)
        row |= {"compress_seconds": time.perf_counter() - start, "calibration": result.calibration}
        row |= {"achieved_keep": result.plan.achieved_keep, "statistics": spec.statistics}
        row |= {"refit": spec.refit, "dense_path": spec.dense_path, "options": recipe.options}
        row |= {"dense_sites": sum(site.decision.kind == "dense" for site in result.plan.sites)}
        row |= {"shared_groups": sum(one.pays for one in result.sharing), "compared_groups": len(result.sharing)}
    parameters = list(model.parameters())  # a shared one once
    buffers = sum(b.numel() * b.itemsize for name, b in model.named_buffers() if name.endswith("order"))
    row |= {"model_parameters": sum(p.numel() for p in parameters)}
    row |= {"bytes": sum(p.numel() * p.itemsize for p in parameters) + buffers}
    return row | measured(model, tokenizer)


def stages(line: dict[str, Any]) -> tuple[str, str, float | None]:
    """Return when statistics were collected, the refit, and the dense path's share in the targets of either, if any."""
    method = METHODS[line["method"]]
    refit = method.refit(line["keep"]) if line["refit"] == "auto" else line["refit"]
    has_targets = line["statistics"] == "sequential" or refit != "off"
    return line["statistics"], refit, line.get("dense_path", 0.0) if has_targets else None


def options_of(line: dict[str, Any]) -> dict[str, Any]:
    """Return the options of a cell; on this page statistics are not shrunk unless it says so."""
    return {name: value for name, value in line.get("options", {}).items() if UNSHRUNK.get(name) != value}


def usual(line: dict[str, Any]) -> bool:
    """Whether a cell is what `auto` gives its method."""
    if line["method"] == "dense":
        return True
    recipe = pared.Recipe(method=line["method"], keep=line["keep"], structures="ranks")
    spec = resolve_low_rank(recipe)
    asked = {"statistics": spec.statistics, "refit": spec.refit, "dense_path": spec.dense_path}
    return stages(line) == stages(line | asked) and not options_of(line)


def key_of(line: dict[str, Any]) -> tuple[object, ...]:
    """Return what distinguishes a cell from every other."""
    if line["method"] == "dense":
        return line["model"], "dense"
    named = tuple(line[name] for name in ("model", "method", "keep", "text", "samples"))
    return (*named, *stages(line), *sorted(options_of(line).items()))


def told(line: dict[str, Any]) -> str:
    """Return in words what a cell asks for."""
    statistics, refit, share = stages(line)
    words = [f"statistics {statistics}", f"refit {refit}", *(f"{k} {v}" for k, v in options_of(line).items())]
    return ", ".join(words if share is None else [*words, f"dense path {share:g}"])


def tables(lines: list[dict[str, Any]]) -> list[str]:
    """Return the tables of one model."""
    dense = next(line for line in lines if line["method"] == "dense")
    texts = list(dense["perplexity"])
    order = {method: number for number, method in enumerate(METHODS)}
    grid = sorted(
        (line for line in lines if line.get("samples", SAMPLES) == SAMPLES),
        key=lambda line: (-line["keep"], order.get(line["method"], -1), not usual(line), str(key_of(line))),
    )
    others = sorted(
        (line for line in lines if line.get("samples", SAMPLES) != SAMPLES),
        key=lambda line: (-line["keep"], order[line["method"]], line["samples"]),
    )

    def cells(line: dict[str, Any]) -> tuple[str, ...]:
        return (
            line["method"] + ("" if usual(line) else f" ({told(line)})"),
            f"{line['keep']:g}",
            f"{line['model_parameters'] / 1e6:.1f} M",
            f"{line['bytes'] / 2**20:,.0f} MiB",
            *ratios(line, dense),
        )

    header = ("method", "keep", "parameters", "bytes", *texts)
    samples = [
        "### More and fewer calibration samples",
        "",
        table(("samples", *header), [(str(line["samples"]), *cells(line)) for line in others]),
        "",
    ]
    return [table(header, [cells(line) for line in grid]), "", *(samples if others else ())]


def render(lines: list[dict[str, Any]]) -> str:
    """Return the page."""
    models = dict.fromkeys(line["model"] for line in lines)
    calibrated = next((line for line in lines if line.get("calibration")), {"text": "-", "calibration": {}})
    parts = [
        part
        for name in models
        for part in (f"## {name}", "", *((PICTURE, "") if name == MODEL else ()),
                     *tables([line for line in lines if line["model"] == name]))
    ]  # fmt: skip
    return "\n".join(
        [
            "# Low-rank methods",
            "",
            "Made by `python benchmarks/low_rank.py`; raw figures in [low_rank.jsonl](low_rank.jsonl). Do not edit. "
            "What they say is summarised in [low_rank.md](../low_rank.md#what-was-measured).",
            "",
            f"Models in the dtype they come in; calibrated on {SAMPLES} x {LENGTH} tokens of {calibrated['text']}; "
            f"perplexity on the first {WINDOWS} windows of {LENGTH} tokens of each text, no beginning-of-sequence "
            "token, in brackets as a multiple of the dense model's. `keep` counts the linear layers inside the blocks; "
            "parameters and bytes are the whole model's, the order of pivots included. Every method with what `auto` "
            "gives it: allocation, storage, statistics, refit and dense path; a row that differs says how in brackets. "
            "C4 and the speeches (State of the Union addresses, 1945 to 2006) were never calibrated on.",
            "",
            *parts,
            signature(lines),
        ]
    )


def curves(lines: list[dict[str, Any]]) -> dict[str, dict[str, list[tuple[float, float]]]]:
    """Return multiples of the dense perplexity over keep, by text and method."""
    lines = [line for line in lines if line["model"] == MODEL]
    dense = next(line for line in lines if line["method"] == "dense")["perplexity"]
    shown = [line for line in lines if line.get("samples") == SAMPLES and usual(line)]
    return {
        text: {
            m: [(c["keep"], c["perplexity"][text] / dense[text]) for c in shown if c["method"] == m] for m in METHODS
        }
        for text in dense
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--methods", nargs="+", default=["dense", *METHODS])
    parser.add_argument("--keep", nargs="+", type=float, default=[0.8, 0.6, 0.5, 0.7, 0.9])
    parser.add_argument("--text", default="wikitext2:train")
    parser.add_argument("--samples", type=int, default=SAMPLES)
    parser.add_argument("--statistics", default="auto", choices=("auto", "once", "sequential"))
    parser.add_argument("--refit", default="auto", choices=("auto", "off", "update", "sequential"))
    parser.add_argument("--dense-path", type=float, help="share of the dense model's outputs in targets")
    parser.add_argument("--option", action="append", default=[], help="of the methods, NAME=VALUE")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--render", action="store_true")
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    calibration = pared.Calibration(text=asked.text, samples=asked.samples, length=LENGTH)
    beside = {"statistics": asked.statistics, "refit": asked.refit, "options": named_values(asked.option) or {}}
    beside |= {} if asked.dense_path is None else {"dense_path": asked.dense_path}
    cells: list[tuple[dict[str, Any], pared.Recipe | None]] = []
    for keep in asked.keep:
        for method in asked.methods:
            row = {"model": asked.model, "method": method, "keep": keep, "text": asked.text, "samples": asked.samples}
            if method == "dense":
                cells.append((row, None))
                continue
            own = UNSHRUNK if method == "loss-optimal" else {}
            options = {"options": {**own, **beside["options"]}, "structures": "ranks"}
            recipe = pared.Recipe(method=method, keep=keep, calibration=calibration, **{**beside, **options})
            spec = resolve_low_rank(recipe)
            stage = {"statistics": spec.statistics, "refit": spec.refit, "options": recipe.options}
            cells.append((row | stage | {"dense_path": spec.dense_path}, recipe))
    if not asked.render:
        require_disjoint(asked.text)
        for number, (cell, recipe) in enumerate(cells, 1):
            if key_of(cell) not in {key_of(line) for line in read(LINES)}:
                row = measure(asked.model, recipe)
                append(LINES, row)
                print(f"{number}/{len(cells)} {key_of(cell)}: {row['perplexity']}", flush=True)
    plot(PLOT, curves(read(LINES)), "keep", falling=True, most=100)
    PAGE.write_text(render(read(LINES)), encoding="utf-8")
    print(PAGE.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
