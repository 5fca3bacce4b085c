"""How much longer than a bare forward pass of the blocks does a whole compression take, and where does the time go?

    python benchmarks/road.py                            # measures what is missing, renders docs/results/road.md
    python benchmarks/road.py --methods basis-sharing    # one of the cases
    python benchmarks/road.py --render                   # renders only

Single-threaded and interleaved (bare, bare with freed memory kept, whole, whole with a second processor; and again),
each in a process of its own; the ratios are taken within a pair, of seconds on the clock and of the process's own (user
and system), which other work on the machine does not lengthen. One JSON line a pair; pairs of the same settings, commit
and processor are not measured again.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from typing import Any

import torch

from pared.calibration import BlockStatistics, capture
from pared.data.texts import find_text
from pared.data.windows import cut
from pared.engine.blocks import run_blocks
from pared.entrypoints.run import run
from pared.environment import choose_dtype, device_of
from pared.lowrank.registry import nothing
from pared.memory import keep_freed
from pared.models.source import find_model
from pared.schema.recipe import Recipe
from pared.structure import find_anatomy, probe
from pared.structure.store import ResidentBlocks
from record import RESULTS, alone, append, provenance, ranks_alone, read, spread, table

LINES = RESULTS / "road.jsonl"
PAGE = RESULTS / "road.md"
# What is asked for, and how many bare forward passes it may take at most.
CASES: dict[str, tuple[dict[str, Any], float]] = {
    "svd-llm": ({"method": "svd-llm"}, 1.5),
    "basis-sharing": ({"method": "basis-sharing", "options": {"group_size": 2}}, 1.5),
    "loss-optimal": (ranks_alone(output_weighting="diagonal"), 4.0),
    "wanda": ({"method": "wanda", "sparsity": 0.5}, 2.1),
    "mixed": ({"method": "loss-optimal", "structures": "mixed", "options": {"output_weighting": "diagonal"}}, 4.5),
}


class Clock:
    """Seconds since it was made: on the clock, and of this process and what it starts."""

    def __init__(self) -> None:
        self._start = self._now()

    @staticmethod
    def _now() -> tuple[float, float]:
        return time.perf_counter(), sum(os.times()[:4])

    def read(self) -> tuple[float, float]:
        """Return both."""
        wall, own = (now - then for now, then in zip(self._now(), self._start, strict=True))
        return wall, own


def bare_seconds(recipe: Recipe, kept: bool) -> tuple[float, float]:
    """Time the blocks alone on the calibration tokens, in the dtype the compression uses; nothing is collected.

    With ``kept`` the process keeps memory that it frees, as a compression's does; else as Python starts it.
    """
    torch.set_num_threads(1)
    if kept:
        keep_freed()
    source = find_model(str(recipe.model))
    model, tokenizer, asked = source.load(), source.tokenizer(), recipe.calibration
    device = device_of(recipe.device)
    dtype = choose_dtype(asked.dtype, model.dtype, device)
    windows = cut(find_text(asked.text), tokenizer, asked.length, asked.samples, asked.sampling, asked.seed)
    anatomy, calls = probe(model, find_anatomy(model))
    inputs = capture(model, anatomy, windows.tokens, asked.batch, calls, dtype, device)
    for block in anatomy.blocks(model):
        block.to(dtype)

    def visit(_: BlockStatistics) -> None:
        """Nothing is done to a block."""

    clock = Clock()
    run_blocks(ResidentBlocks(model, anatomy), anatomy, inputs, nothing, visit)
    return clock.read()


def whole_seconds(recipe: Recipe, processors: int) -> tuple[tuple[float, float], dict[str, float]]:
    """Time the whole job, from the model's name to the checked folder, without measuring perplexity.

    Where a second processor may be used, blocks are solved beside the run of the next ones, by a thread of their own.
    """
    torch.set_num_threads(1)
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:processors])
    with tempfile.TemporaryDirectory() as folder:
        clock = Clock()
        outcome = run(recipe.model_copy(update={"out": f"{folder}/out", "evaluation": None}))
        return clock.read(), outcome.manifest.seconds


def peak_memory(recipe: Recipe) -> dict[str, float]:
    """Return the peak resident bytes of a fresh process, after the imports and after the whole job, and the model's."""
    code = (
        "import json, sys, torch, transformers.models.llama.modeling_llama; torch.set_num_threads(1); import pared; "
        "from pared.environment import peak_memory_bytes as peak; "
        "recipe = pared.Recipe.of(json.loads(sys.argv[1])); imported = peak(); pared.run(recipe, resume=False); "
        "print(imported, peak())"
    )
    with tempfile.TemporaryDirectory() as folder:
        asked = recipe.model_copy(update={"out": f"{folder}/out", "evaluation": None}).model_dump_json()
        told = subprocess.run([sys.executable, "-c", code, asked], capture_output=True, text=True, check=True).stdout
    imported, peak = (int(word) for word in told.split()[-2:])
    model = find_model(str(recipe.model)).load()
    return {"imported": imported, "peak": peak, "model_bytes": sum(p.numel() * p.itemsize for p in model.parameters())}


MEMORY = "peak memory above the imports, of the model"


def render(lines: list[dict[str, Any]]) -> str:
    """Return the page."""
    last = lines[-1]
    order = list(CASES)
    newest = {(line["case"], line["cpu"], line["dtype"]): line["commit"] for line in lines}  # the last of each machine
    groups: dict[tuple[str, str, str, str], list[dict[str, Any]]] = {}
    for line in sorted(lines, key=lambda line: order.index(line["case"])):
        where = (line["case"], line["cpu"], line["dtype"])
        if line["commit"] == newest[where]:
            groups.setdefault((*where, line["commit"]), []).append(line)
    text = [
        "# What a compression costs",
        "",
        "Made by `python benchmarks/road.py`; raw figures in [road.jsonl](road.jsonl). Do not edit.",
        "",
        f"`{last['model']}` calibrated on {last['samples']} x {last['length']} tokens of {last['text']}, keep 0.8 "
        "unless a sparsity is given, from the model's name to the folder reloaded and checked, no perplexity. "
        "One thread on one processor, bare forward pass of the blocks and whole job in turns, in the dtype that is "
        "faster on the machine; median (least to most); ratios within a pair, of seconds on the clock and of the "
        "process's own. Where the two differ, other work ran on the machine. A compression keeps memory that it frees "
        "for the next batch, in place of giving it to the system and taking it again page by page; a bare pass that "
        "does so too is beside the one that Python starts. *With a second processor* a thread of its own solves each "
        "block beside the run of the next, where that reads what dense blocks output (not `wanda`); the bare pass has "
        "one thread all the same. The last commit that was measured on each machine.",
        "",
        table(
            (
                (
                    "method",
                    "options",
                    "machine",
                    "commit",
                    "pairs",
                    "whole / bare, clock",
                    "own",
                    "whole / bare with freed memory kept",
                    "whole with a second processor / bare",
                    "bar",
                    MEMORY,
                )
            ),
            [_summary(*key, own) for key, own in groups.items()],
        ),
        "",
    ]
    for (name, *_), own in groups.items():
        text += [f"## {name}, {_machine(own[0]['cpu'], own[0]['dtype'])}, {own[0]['commit']}", "", _stages(own), ""]
    text.append(
        f"Commits {', '.join(sorted({line['commit'] for line in lines}))}; {last['date']}, {last['cpu']}, "
        f"{last['threads']} thread, torch {last['torch']}, transformers {last['transformers']}, Python "
        f"{last['python']}.\n"
    )
    return "\n".join(text)


def _pairs(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [line for line in lines if line["what"] == "pair"]


def _machine(cpu: str, dtype: str) -> str:
    return f"{cpu}, {dtype.removeprefix('torch.')}"


def _summary(name: str, cpu: str, dtype: str, commit: str, lines: list[dict[str, Any]]) -> tuple[str, ...]:
    fields, bar = CASES[name]
    told = {**fields.get("options", {}), **{name: fields[name] for name in ("sparsity",) if name in fields}}
    options = ", ".join(f"{option} {value}" for option, value in told.items())
    over = [(line["peak"] - line["imported"]) / line["model_bytes"] for line in lines if line["what"] == "memory"]
    ratios = [line["whole"] / line["bare"] for line in _pairs(lines)]
    own = [line["whole_own"] / line["bare_own"] for line in _pairs(lines) if "bare_own" in line]
    kept = [line["whole"] / line["bare_kept"] for line in _pairs(lines) if "bare_kept" in line]
    beside = [line["beside"] / line["bare"] for line in _pairs(lines) if "beside" in line]
    memory = f"{over[-1]:.2f} x" if over else "-"
    return (
        name,
        options or "-",
        _machine(cpu, dtype),
        commit,
        str(len(ratios)),
        spread(ratios),
        f"**{spread(own)}**" if own else "-",
        spread(kept) if kept else "-",
        f"**{spread(beside)}**" if beside else "-",
        f"{bar}",
        memory,
    )


def _stages(lines: list[dict[str, Any]]) -> str:
    pairs = _pairs(lines)
    stages = sorted(
        {stage for line in pairs for stage in line["seconds"]}, key=lambda s: -pairs[0]["seconds"].get(s, 0)
    )
    rows = [("bare forward pass of the blocks", spread([line["bare"] for line in pairs]), "")]
    rows += [
        (
            stage,
            spread([line["seconds"].get(stage, 0.0) for line in pairs]),
            spread([100 * line["seconds"].get(stage, 0.0) / line["whole"] for line in pairs], 1) + " %",
        )
        for stage in stages
    ]
    rows.append(("whole job", spread([line["whole"] for line in pairs]), "100 %"))
    return table(("stage", "seconds", "share of the whole"), rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="embedded:smollm2-135m")
    parser.add_argument("--methods", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--text", default="wikitext2:train")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--render", action="store_true")
    asked = parser.parse_args()
    for case in [] if asked.render else asked.methods:
        calibration = {"text": asked.text, "samples": asked.samples, "length": asked.length}
        recipe = Recipe.of({"model": asked.model, "calibration": calibration, **CASES[case][0]})
        dtype = choose_dtype("auto", torch.float32, torch.device("cpu"))
        about = {"case": case, "model": asked.model, "method": recipe.method, "options": recipe.options,
                 "keep": recipe.keep, "sparsity": recipe.sparsity, "text": asked.text, "samples": asked.samples,
                 "length": asked.length, "dtype": str(dtype)}  # fmt: skip
        same = about | {name: provenance()[name] for name in ("commit", "cpu")}
        there = [line for line in read(LINES) if same.items() <= line.items()]
        for number in range(len(_pairs(there)), asked.pairs):
            bare, bare_own = alone(bare_seconds, recipe, False)
            bare_kept, kept_own = alone(bare_seconds, recipe, True)
            (whole, whole_own), seconds = alone(whole_seconds, recipe, 1)
            (beside, _), seconds_beside = alone(whole_seconds, recipe, 2)
            clock = {"bare": bare, "bare_kept": bare_kept, "whole": whole, "beside": beside}
            own = {"bare_own": bare_own, "bare_kept_own": kept_own, "whole_own": whole_own}
            append(LINES, {"what": "pair", **about, **clock, **own, "seconds": seconds,
                           "seconds_beside": seconds_beside})  # fmt: skip
            told = (
                f"bare {bare:.1f} s, {bare_kept:.1f} s with freed memory kept, whole {whole:.1f} s, "
                f"{whole / bare:.2f} x, {whole / bare_kept:.2f} x, own {whole_own / bare_own:.2f} x; with a second "
                f"processor {beside:.1f} s, {beside / bare:.2f} x"
            )
            print(f"{case} {number + 1}/{asked.pairs}: {told}", flush=True)
        if all(line["what"] != "memory" for line in there):
            append(LINES, {"what": "memory", **about, **peak_memory(recipe)})
    if not (lines := read(LINES)):
        raise SystemExit(f"{LINES} has no lines; run without --render first")
    PAGE.write_text(render(lines), encoding="utf-8")
    print(PAGE.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
