"""How much longer than a bare forward pass of the blocks does a whole compression take, and where does the time go?

    python benchmarks/road.py                 # measures, appends JSON lines, renders docs/results/road.md
    python benchmarks/road.py --render        # renders only

Single-threaded and interleaved (bare, whole, bare, whole ...) in one process; the ratio is taken within a pair.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from typing import Any

import torch

import pared
from pared.anatomy import find_anatomy, probe
from pared.calibration import capture, choose_dtype, walk
from pared.engine import run
from pared.lowrank.methods import nothing
from pared.recipe import Recipe
from pared.sources.models import find_model
from pared.sources.texts import find_text
from pared.sources.windows import cut
from record import RESULTS, append, read, spread, table

LINES = RESULTS / "road.jsonl"
PAGE = RESULTS / "road.md"
BAR = 2.0


def bare_seconds(recipe: Recipe) -> float:
    """Time the blocks alone on the calibration tokens, in the dtype the compression uses; nothing is collected."""
    source = find_model(str(recipe.model))
    model, tokenizer, asked = source.load(), source.tokenizer(), recipe.calibration
    device = torch.device(recipe.device)
    dtype = choose_dtype(asked.dtype, model.dtype, device)
    windows = cut(find_text(asked.text), tokenizer, asked.length, asked.samples, asked.sampling, asked.seed)
    anatomy, calls = probe(model, find_anatomy(model))
    inputs = capture(model, anatomy, windows.tokens, asked.batch, calls, dtype, device)
    blocks = [block.to(dtype) for block in anatomy.blocks(model)]
    start = time.perf_counter()
    for _ in walk(blocks, anatomy, inputs, nothing):
        pass
    return time.perf_counter() - start


def whole_seconds(recipe: Recipe) -> tuple[float, dict[str, float]]:
    """Time the whole job, from the model's name to the checked folder, without measuring perplexity."""
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        outcome = run(recipe.model_copy(update={"out": f"{folder}/out", "evaluation": None}))
        return time.perf_counter() - start, outcome.manifest.seconds


def peak_memory(recipe: Recipe) -> dict[str, float]:
    """Return the peak resident bytes of a fresh process, after the imports and after the whole job, and the model's."""
    code = (
        "import json, sys, torch, transformers.models.llama.modeling_llama; torch.set_num_threads(1); import pared; "
        "from pared.engine.progress import peak_memory_bytes as peak; "
        "recipe = pared.Recipe.of(json.loads(sys.argv[1])); imported = peak(); pared.run(recipe); "
        "print(imported, peak())"
    )
    with tempfile.TemporaryDirectory() as folder:
        asked = recipe.model_copy(update={"out": f"{folder}/out", "evaluation": None}).model_dump_json()
        told = subprocess.run([sys.executable, "-c", code, asked], capture_output=True, text=True, check=True).stdout
    imported, peak = (int(word) for word in told.split()[-2:])
    model = find_model(str(recipe.model)).load()
    return {"imported": imported, "peak": peak, "model_bytes": sum(p.numel() * p.itemsize for p in model.parameters())}


def render(lines: list[dict[str, Any]]) -> str:
    """Return the page."""
    pairs = [line for line in lines if line["what"] == "pair"]
    memory = next((line for line in reversed(lines) if line["what"] == "memory"), None)
    last = pairs[-1]
    ratios = [line["whole"] / line["bare"] for line in pairs]
    stages = sorted({name for line in pairs for name in line["seconds"]}, key=lambda s: -last["seconds"].get(s, 0))
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
    text = [
        "# What a compression costs",
        "",
        "Made by `python benchmarks/road.py`; raw figures in [road.jsonl](road.jsonl). Do not edit.",
        "",
        f"`{last['method']}` at keep {last['keep']} of `{last['model']}`, calibrated on {last['samples']} x "
        f"{last['length']} tokens of {last['text']}, blocks in {last['dtype']}, from the model's name to the folder "
        "reloaded and checked, perplexity not measured. One thread, bare and whole in turns, "
        f"{len(pairs)} pairs; median (least to most).",
        "",
        f"**Whole / bare: {spread(ratios)}** (bar: at most {BAR})",
        "",
        table(("stage", "seconds", "share of the whole"), rows),
        "",
    ]
    if memory:
        over = (memory["peak"] - memory["imported"]) / memory["model_bytes"]
        text += [
            f"Peak memory: {memory['peak'] / 2**20:,.0f} MiB resident, of which {memory['imported'] / 2**20:,.0f} MiB "
            f"after the imports; the model's weights are {memory['model_bytes'] / 2**20:,.0f} MiB. "
            f"**Above the imports, {over:.2f} x the model.**",
            "",
        ]
    text.append(
        f"Commit {last['commit']}, {last['date']}, {last['cpu']}, {last['threads']} thread, torch {last['torch']}, "
        f"transformers {last['transformers']}, Python {last['python']}.\n"
    )
    return "\n".join(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="embedded:smollm2-135m")
    parser.add_argument("--method", default="svd-llm")
    parser.add_argument("--text", default="wikitext2:train")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--render", action="store_true")
    asked = parser.parse_args()
    if not asked.render:
        torch.set_num_threads(1)
        recipe = pared.Recipe.of(
            {
                "model": asked.model,
                "method": asked.method,
                "calibration": {"text": asked.text, "samples": asked.samples, "length": asked.length},
            }
        )
        dtype = choose_dtype("auto", torch.float32, torch.device("cpu"))
        about = {"model": asked.model, "method": asked.method, "keep": recipe.keep, "text": asked.text,
                 "samples": asked.samples, "length": asked.length, "dtype": str(dtype)}  # fmt: skip
        LINES.unlink(missing_ok=True)
        for number in range(asked.pairs):
            bare = bare_seconds(recipe)
            whole, seconds = whole_seconds(recipe)
            append(LINES, {"what": "pair", **about, "bare": bare, "whole": whole, "seconds": seconds})
            print(f"pair {number + 1}/{asked.pairs}: bare {bare:.1f} s, whole {whole:.1f} s, {whole / bare:.2f} x")
        append(LINES, {"what": "memory", **about, **peak_memory(recipe)})
    PAGE.write_text(render(read(LINES)), encoding="utf-8")
    print(PAGE.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
