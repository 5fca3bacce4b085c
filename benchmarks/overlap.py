"""Does decomposing in a second thread, beside the forward pass, shorten a compression?

    python benchmarks/overlap.py            # measures what is missing, renders docs/results/overlap.md
    python benchmarks/overlap.py --render   # renders only

As it does by itself, and with blocks solved in turn. Every run is a process of its own; ways take turns. One JSON line
a run.
"""

import argparse
import hashlib
import os
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from pared.entrypoints.run import run
from pared.schema.recipe import Recipe
from record import RESULTS, alone, append, ranks_alone, read, spread, table

LINES, PAGE = RESULTS / "overlap.jsonl", RESULTS / "overlap.md"
METHODS: dict[str, dict[str, Any]] = {
    "svd-llm": {},
    "loss-optimal": ranks_alone(output_weighting="diagonal"),
}
# Threads of the forward pass, and whether a second thread of as many solves beside it.
WAYS = ((1, False), (1, True), (2, False), (2, True))


def measured(recipe: Recipe, threads: int, beside: bool) -> dict[str, Any]:
    """Time a whole job, in this process, and tell its weights by their digest."""
    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory() as folder, patch("pared.engine.compress.pays", lambda _: beside):
        asked = recipe.model_copy(update={"out": f"{folder}/out", "evaluation": None})
        clock, own = time.perf_counter(), sum(os.times()[:4])
        run(asked)
        seconds, taken = time.perf_counter() - clock, sum(os.times()[:4]) - own
        weights = b"".join(path.read_bytes() for path in sorted(Path(f"{folder}/out").glob("*.safetensors")))
    return {"seconds": seconds, "own": taken, "digest": hashlib.sha256(weights).hexdigest()[:12]}


def render(lines: list[dict[str, Any]]) -> str:
    """Return the page."""
    groups: dict[tuple[str, int, bool], list[dict[str, Any]]] = {}
    for line in lines:
        groups.setdefault((line["method"], line["computing"], line["beside"]), []).append(line)

    def row(key: tuple[str, int, bool], own: list[dict[str, Any]]) -> tuple[str, ...]:
        method, threads, beside = key
        in_turn = {line["round"]: line["seconds"] for line in groups[method, threads, False]}
        ratios = [line["seconds"] / in_turn[line["round"]] for line in own]
        return (
            method,
            str(threads),
            "beside" if beside else "in turn",
            spread([line["seconds"] for line in own], 1),
            spread([line["own"] / line["seconds"] for line in own]),
            spread(ratios),
            ", ".join(sorted({line["digest"] for line in own})),
        )

    last = lines[-1]
    header = ("method", "threads", "solved", "seconds", "cores busy", "of the time in turn", "digest of the weights")
    return "\n".join([
        "# Decomposing beside the forward pass",
        "",
        "Made by `python benchmarks/overlap.py`; raw figures in [overlap.jsonl](overlap.jsonl). Do not edit.",
        "",
        f"`{last['model']}` calibrated on {last['samples']} x {last['length']} tokens of {last['text']}, on "
        f"{last['cores']} cores; whole job, median (least to most). A block is decomposed in turn, between its forward "
        "pass and that of the next, or beside the next one's, by a second thread.",
        "",
        table(header, [row(key, own) for key, own in sorted(groups.items())]),
        "",
        f"Commits {', '.join(sorted({line['commit'] for line in lines}))}; {last['date']}, {last['cpu']}, torch "
        f"{last['torch']}, transformers {last['transformers']}, Python {last['python']}.",
        "",
    ])  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="embedded:smollm2-135m")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--text", default="wikitext2:train")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--render", action="store_true")
    asked = parser.parse_args()
    calibration = {"text": asked.text, "samples": asked.samples, "length": asked.length}
    for number in [] if asked.render else range(asked.rounds):
        for method in asked.methods:
            recipe = Recipe.of({"model": asked.model, "calibration": calibration, "method": method, **METHODS[method]})
            for threads, beside in WAYS:
                about = {"method": method, "model": asked.model, **calibration, "computing": threads,
                         "beside": beside, "round": number, "cores": os.cpu_count()}  # fmt: skip
                if any(about.items() <= line.items() for line in read(LINES)):
                    continue
                found = alone(measured, recipe, threads, beside)
                append(LINES, {**about, **found})
                print(method, threads, beside, {name: found[name] for name in ("seconds", "own")}, flush=True)
    if not (lines := read(LINES)):
        raise SystemExit(f"{LINES} has no lines; run without --render first")
    PAGE.write_text(render(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
