"""What training gives back: loss-optimal folders before and after adapters, all factors, and distillation.

``python benchmarks/recovery.py`` fills the grid at equal tokens and renders docs/results/recovery.md;
``--long`` runs the one long distillation. A cell whose line is there is not run again, and a training that was killed
resumes where it stopped.
"""

import argparse
import os
import time
from pathlib import Path
from typing import Any

import pared
from grid import LENGTH, SAMPLES, WINDOWS, measured, ratios, require_disjoint, signature
from pared import tune
from pared.schema.manifest import Manifest
from pared.schema.training import TrainingConfig
from record import RESULTS, append, ranks_alone, read, table

LINES, PAGE = RESULTS / "recovery.jsonl", RESULTS / "recovery.md"
CALIBRATION = "wikitext2:train"
MIX = ("c4:train", "wikitext2:train")
PLACE = Path(os.environ.get("PARED_CACHE", "~/.cache/pared")).expanduser() / "benchmarks" / "recovery"

# What is tried at equal tokens: the papers' learning rates, and higher ones, as few tokens move little at those.
GRID: list[dict[str, Any]] = [
    {"method": "lora", "learning_rate": 1e-3},
    {"method": "distill", "learning_rate": 3e-5, "options": {"text": 0.5}},
    {"method": "full", "learning_rate": 3e-5},
    {"method": "distill", "learning_rate": 3e-5},
    {"method": "lora", "learning_rate": 1e-4},
    {"method": "distill", "learning_rate": 1e-3, "options": {"text": 0.5, "adapters": 8}},
    {"method": "distill", "learning_rate": 3e-5, "options": {"text": 0.5, "hidden": 1.0}},
    {"method": "distill", "learning_rate": 1e-4, "options": {"text": 0.5}},
    {"method": "full", "learning_rate": 2e-6},
]
LONG: list[dict[str, Any]] = [{"method": "distill", "learning_rate": 3e-5, "options": {"text": 0.5}}]
LONG_TOKENS = 65_536
BATCH = 1  # windows a step: at so few tokens many small steps are better than few large ones, for every method


def compressed(model: str, keep: float) -> Path:
    """Return the folder of a compression, made if it is not there."""
    out = PLACE / f"loss-optimal-{keep:g}"
    if not (out / "pared.json").exists():
        calibration = {"text": CALIBRATION, "samples": SAMPLES, "length": LENGTH}
        pared.run(pared.Recipe.model_validate({
            "model": model, **ranks_alone(), "keep": keep, "calibration": calibration, "evaluation": None,
            "out": str(out),
        }))  # fmt: skip
    return out


def named(cell: dict[str, Any]) -> str:
    """Return the name of a cell's folder."""
    options = [f"{name}-{value:g}" for name, value in cell.get("options", {}).items()]
    return "-".join([*(str(cell[name]) for name in ("method", "keep", "learning_rate", "tokens", "batch")), *options])


def train(parent: Path, cell: dict[str, Any]) -> dict[str, Any]:
    """Train a folder one way and measure it on every text."""
    out = PLACE / named(cell)
    if not (out / "pared.json").exists():
        asked = {name: cell[name] for name in ("method", "learning_rate", "tokens", "batch", "length")}
        tune(TrainingConfig.of({
            **asked, "options": cell.get("options", {}), "model": str(parent), "out": str(out),
            "data": list(cell["data"]), "evaluation": None, "checkpoint_every": 20, "schedule": cell["schedule"],
        }), resume=True)  # fmt: skip
    training = Manifest.read(out).training[-1]
    row = {**cell, "stages": training.stages, "seconds": training.seconds, "settled": training.settled}
    row |= {"peak_memory_bytes": training.peak_memory_bytes}
    return row | measured(pared.load(out), pared.load_tokenizer(out))


def key_of(line: dict[str, Any]) -> tuple[object, ...]:
    """Return what distinguishes a cell from every other."""
    names = ("method", "keep", "learning_rate", "tokens", "schedule", "batch")
    return (*(line.get(name) for name in names), tuple(sorted(line.get("options", {}).items())))


def render(lines: list[dict[str, Any]]) -> str:
    """Return the page."""
    dense = next(line for line in lines if line["method"] == "dense")
    text = [
        "# What training gives back",
        "",
        "Made by `python benchmarks/recovery.py`; raw figures in [recovery.jsonl](recovery.jsonl). Do not edit.",
        "",
        f"`{dense['model']}`, compressed by loss-optimal, calibrated on {SAMPLES} windows of {LENGTH} tokens of "
        f"{CALIBRATION}; trained on a mix of {' and '.join(MIX)}; perplexity on {WINDOWS} windows of {LENGTH} tokens "
        "of texts that were neither calibrated nor trained on, and what multiple it is of the untuned dense model's. "
        "All follow a cosine, and lora has a rate ten times the paper's, as there are few tokens.",
        "",
    ]
    for keep in sorted({line["keep"] for line in lines if line["keep"] < 1}, reverse=True):
        rows = [
            (
                " ".join([line["method"], *(f"{name}={value:g}" for name, value in line.get("options", {}).items())]),
                f"{line['batch']} x {line['length']}" if line.get("batch") else "",
                f"{line['learning_rate']:g}" if line.get("learning_rate") else "",
                f"{sum(stage['tokens'] for stage in line['stages']):,}" if line.get("stages") else "0",
                f"{line['seconds'][line['stages'][0]['name']] / 60:.0f}" if line.get("stages") else "",
                *ratios(line, dense),
            )
            for line in lines
            if line["keep"] == keep
        ]
        header = ("training", "a step", "learning rate", "tokens", "minutes", *dense["perplexity"])
        text += [f"## keep {keep:g}", "", table(header, rows), ""]
    return "\n".join([*text, signature(lines)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="embedded:smollm2-135m")
    parser.add_argument("--keep", type=float, nargs="+", default=[0.8, 0.6])
    parser.add_argument("--tokens", type=int, help=f"[default: 16384, with --long {LONG_TOKENS}]")
    parser.add_argument("--long", action="store_true", help="the one long distillation, at the first keep")
    parser.add_argument("--first", type=int, default=len(GRID), help="only so many of the trainings")
    parser.add_argument("--render", action="store_true")
    asked = parser.parse_args()
    asked.tokens = asked.tokens or (LONG_TOKENS if asked.long else 16_384)
    if not asked.render:
        for text in (CALIBRATION, *MIX):
            require_disjoint(text)
        run(asked)
    PAGE.write_text(render(read(LINES)), encoding="utf-8")
    print(PAGE.read_text(encoding="utf-8"))


def run(asked: argparse.Namespace) -> None:
    """Fill what is missing."""

    def missing(cell: dict[str, Any]) -> bool:
        return key_of(cell) not in {key_of(line) for line in read(LINES)}

    if missing({"method": "dense", "keep": 1.0}):
        model = pared.load(asked.model)
        append(LINES, {"model": asked.model, "method": "dense", "keep": 1.0}
               | measured(model, pared.load_tokenizer(asked.model)))  # fmt: skip
    for keep in asked.keep[:1] if asked.long else asked.keep:
        parent = compressed(asked.model, keep)
        if missing({"method": "none", "keep": keep}):
            row = {"method": "none", "keep": keep, "model": asked.model}
            append(LINES, row | measured(pared.load(parent), pared.load_tokenizer(parent)))
        for one in LONG if asked.long else GRID[: asked.first]:
            cell = {**one, "keep": keep, "tokens": asked.tokens, "data": MIX, "batch": BATCH, "length": 512}
            cell["schedule"] = "cosine"
            if missing(cell):
                start = time.perf_counter()
                append(LINES, train(parent, cell))
                print(f"{named(cell)}: {time.perf_counter() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main()
