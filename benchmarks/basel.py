"""Basel against SVD, FWSVD and SVD-LLM for one kind of text: speeches of 1945 to 1999 to train on, later ones to test.

``python benchmarks/basel.py`` fills the grid, ``--ablations`` the ablations; a cell whose line is there is not run
again, and a training that was killed resumes where it stopped. All are tuned for the same steps once compressed.
"""

import argparse
import json
import os
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

import pared
from grid import plot, signature
from pared import tune
from pared.data import find_text
from pared.engine import plan_from_shapes, resolve
from pared.environment import peak_memory_bytes
from pared.models.source import find_model
from pared.schema.manifest import Manifest
from pared.schema.training import TrainingConfig
from record import RESULTS, append, read, table

LINES, PAGE, PLOT = RESULTS / "basel.jsonl", RESULTS / "basel.md", RESULTS / "basel.svg"
MEMORY = RESULTS / "basel_memory.jsonl"
PLACE = Path(os.environ.get("PARED_CACHE", "~/.cache/pared")).expanduser() / "benchmarks" / "basel"
SIZES = (0.45, 0.8, 0.6)  # of the whole model
WINDOWS, LENGTH, BATCH = 10, 256, 1
BASELINES = ("svd", "fwsvd", "svd-llm")
OURS = "basel, bases of outputs"
METHODS = ("basel", OURS, *BASELINES)
# Of the paper's thousands of steps there is time for a hundred: everything learns faster, coefficients most.
RATE, COEFFICIENTS = 1e-4, 30.0
BASEL = {"prunes": 10, "keeping_epochs": 1.0, "pruning_epochs": 1.0, "post_epochs": 2.0, "new": 8,
         "coefficient_rate": COEFFICIENTS}  # fmt: skip
TOKENS, FEW = 16_384, 8_192  # of tuning after the compression, and of that of the ablations
ABLATIONS: dict[str, dict[str, Any]] = {
    OURS: {},
    "without new bases": {"new": 0},
    "without learning anew": {"relearn": False},
    "importance fisher": {"importance": "fisher"},
    "importance bsi": {"importance": "bsi"},
}


def texts() -> dict[str, str]:
    """Return the speeches to train on and those to test on, as files."""
    named = {}
    source = Path(os.environ["PARED_DATA"]) / "lm" / "us_state_of_the_union_1945_2006.jsonl"
    rows = [json.loads(line) for line in source.read_text(encoding="utf-8").splitlines()]
    for name, wanted in (("train", range(1945, 2000)), ("test", range(2000, 2007))):
        path = PLACE / f"speeches-{name}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        chosen = [json.dumps({"text": row["text"]}) for row in rows if int(row["id"][:4]) in wanted]
        path.write_text("\n".join(chosen) + "\n", encoding="utf-8")
        named[name] = f"file:{path}"
    seen = set(find_text(named["train"]).documents)
    assert not seen & set(find_text(named["test"]).documents)
    return named


def keep_of(size: float, model: str) -> float:
    """Return what may stay of the target parameters for a size of the whole model."""
    plan = plan_from_shapes(find_model(model).skeleton(), resolve(pared.Recipe(method="svd")))
    fixed = plan.before.model_parameters - plan.before.covered_parameters
    return (size * plan.before.model_parameters - fixed) / plan.before.covered_parameters


def perplexity(folder: str, text: str) -> float:
    """Measure a model on the speeches to test on."""
    return pared.perplexity(pared.load(folder), pared.load_tokenizer(folder), text, 1024, WINDOWS).value


def compressed(model: str, method: str, size: float, keep: float, text: str) -> Path:
    """Return the folder of a compression without training."""
    out = PLACE / f"{method}-{size:g}"
    if not (out / "pared.json").exists():
        calibration = {"text": text, "samples": 32, "length": 1024}
        pared.run(pared.Recipe.model_validate({"model": model, "method": method, "keep": keep, "out": str(out),
                                               "calibration": calibration, "evaluation": None}))  # fmt: skip
    return out


def tuning(model: str, out: Path, text: str, tokens: int, **more: Any) -> TrainingConfig:
    """Return what all trainings have in common."""
    return TrainingConfig.of({
        "model": model, "out": str(out), "data": [text], "tokens": tokens, "length": LENGTH, "batch": BATCH,
        "validation": 8, "evaluation": None, "learning_rate": RATE, "checkpoint_every": 32, **more,
    })  # fmt: skip


def run_cell(cell: dict[str, Any], model: str, named: dict[str, str]) -> dict[str, Any]:
    """Compress and tune one way, and measure."""
    name, size, keep, tokens = cell["what"], cell["size"], cell["keep"], cell["tokens"]
    out = PLACE / f"{name.replace(' ', '-').replace(',', '')}-{size:g}-{tokens}"
    start = time.perf_counter()
    if name in BASELINES:
        parent = compressed(model, name, size, keep, named["train"])
        before = perplexity(str(parent), named["test"])
        asked = tuning(str(parent), out, named["train"], tokens, method="full", options={"train": "all"},
                       schedule="cosine")  # fmt: skip
    else:
        before = None
        options = {**BASEL, "keep": keep, "basis": "outputs" if name in ABLATIONS else "weight",
                   **ABLATIONS.get(name, {})}  # fmt: skip
        asked = tuning(model, out, named["train"], 2 * tokens, method="basel", options=options)
    if not (out / "pared.json").exists():
        tune(asked, resume=True)
    manifest = Manifest.read(out)
    training = manifest.training[-1]
    return {
        **cell,
        "before_tuning": before,
        "perplexity": {"speeches of 2000 to 2006": perplexity(str(out), named["test"])},
        "model_parameters": manifest.plan.after.model_parameters,
        "share": manifest.plan.after.model_parameters / manifest.plan.before.model_parameters,
        "stages": training.stages,
        "seconds": time.perf_counter() - start,
        "training_seconds": training.seconds,
        "peak_memory_bytes": training.peak_memory_bytes,
    }


def key_of(line: dict[str, Any]) -> tuple[object, ...]:
    """Return what distinguishes a cell from every other."""
    return tuple(line.get(name) for name in ("what", "size", "tokens"))


def render(lines: list[dict[str, Any]]) -> str:
    """Return the page."""
    dense = next(line for line in lines if line["what"] == "dense")
    (test,) = dense["perplexity"]
    base = dense["perplexity"][test]
    text = [
        "# Basel for one kind of text",
        "",
        "Made by `python benchmarks/basel.py`; raw figures in [basel.jsonl](basel.jsonl). Do not edit.",
        "",
        f"`{dense['model']}`, trained on State of the Union addresses of 1945 to 1999, perplexity on the first "
        f"{WINDOWS} windows of 1,024 tokens of those of 2000 to 2006: dense and untuned {base:.2f}. Sizes are of the "
        "whole model, embedding and head included. Every method is tuned for the same number of tokens after it was "
        "compressed, all parameters, a cosine from 1e-4; Basel's from that times 1/sqrt(keep), as in the paper, with "
        "a short warm-up, and its first part is as long again, with 10 prunes and 8 new bases (paper: 100 and 32). Of "
        "the "
        f"paper's thousands of steps there was time for a hundred of {LENGTH} tokens, so coefficients learn "
        f"{COEFFICIENTS:g} times as fast as the rest.",
        "",
    ]
    for title, tokens, names in (("Methods", TOKENS, METHODS), (f"Ablations of {OURS}", FEW, tuple(ABLATIONS))):
        rows = [
            (
                line["what"],
                f"{line['share']:.3f}",
                f"{line['before_tuning']:,.1f}" if line["before_tuning"] else "",
                f"{line['perplexity'][test]:,.2f} ({line['perplexity'][test] / base:.3f} x)",
                " + ".join(f"{stage['tokens']:,}" for stage in line["stages"]),
                f"{line['seconds'] / 60:.0f}",
                f"{line['peak_memory_bytes'] / 2**20:,.0f}",
            )
            for line in sorted(lines, key=lambda line: (-line["size"], line["perplexity"][test]))
            if line["what"] in names and line.get("tokens") == tokens
        ]
        if rows:
            header = ("method", "size", "before tuning", "perplexity", "tokens", "minutes", "process's peak MiB")
            text += [f"## {title}", "", table(header, rows), ""]
    peaks = [
        (line["what"], f"{line['trained_parameters']:,}", f"{line['peak_memory_bytes'] / 2**20:,.0f}")
        for line in read(MEMORY)
    ]
    if peaks:
        told = f"Four steps of {BATCH} x {LENGTH} tokens, each in a process of its own, imports and reading included."
        text += ["## Memory", "", told, "", table(("training", "parameters trained", "peak MiB"), peaks), ""]
    return "\n".join([*text, "![Perplexity by size](basel.svg)", "", signature(lines)])


def measure_memory(what: str, model: str, named: dict[str, str]) -> None:
    """Note the peak of a few steps of full fine-tuning, or of Basel with every basis still there."""
    if what == "basel":
        with TemporaryDirectory() as place:
            few = {**BASEL, "keep": 0.9, "prunes": 1, "pruning_epochs": 1.0, "post_epochs": 0.0}
            asked = tuning(model, Path(place) / "out", named["train"], 4 * LENGTH, method="basel", options=few)
            training = tune(asked, resume=True).manifest.training[-1]
            trained, peak = training.stages[0]["trained_parameters"], training.peak_memory_bytes
    else:
        dense = pared.load(model).float().train()
        optimizer = torch.optim.AdamW(dense.parameters())
        for _ in range(4):
            tokens = torch.randint(0, 1000, (BATCH, LENGTH))
            dense(input_ids=tokens, labels=tokens).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        trained, peak = sum(one.numel() for one in dense.parameters()), peak_memory_bytes()
    append(MEMORY, {"what": what, "model": model, "trained_parameters": trained, "peak_memory_bytes": peak})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="embedded:smollm2-135m")
    parser.add_argument("--methods", nargs="+", default=METHODS)
    parser.add_argument("--sizes", type=float, nargs="+", default=list(SIZES))
    parser.add_argument("--ablations", action="store_true", help="at the first of the sizes, on half of the tokens")
    parser.add_argument("--memory", choices=["full fine-tuning", "basel"], help="only the peak of a few steps")
    parser.add_argument("--render", action="store_true")
    asked = parser.parse_args()
    if asked.memory:
        measure_memory(asked.memory, asked.model, texts())
    elif not asked.render:
        named = texts()
        if not read(LINES):
            found = perplexity(asked.model, named["test"])
            append(LINES, {"what": "dense", "size": 1.0, "model": asked.model, "share": 1.0, "before_tuning": None,
                           "perplexity": {"speeches of 2000 to 2006": found}})  # fmt: skip
        for size in asked.sizes[:1] if asked.ablations else asked.sizes:
            for what in ABLATIONS if asked.ablations else asked.methods:
                tokens = FEW if asked.ablations else TOKENS
                cell = {"what": what, "size": size, "tokens": tokens, "keep": keep_of(size, asked.model)}
                if key_of(cell) not in {key_of(line) for line in read(LINES)}:
                    append(LINES, run_cell(cell, asked.model, named))
                    print(f"{key_of(cell)}: {read(LINES)[-1]['perplexity']}", flush=True)
    lines = read(LINES)
    (test,) = lines[0]["perplexity"]
    base = lines[0]["perplexity"][test]
    points = {
        what: [
            (line["share"], line["perplexity"][test] / base) for line in lines if key_of(line)[::2] == (what, TOKENS)
        ]
        for what in METHODS
    }
    curves = {test: points}
    if any(points.values()):
        plot(PLOT, curves, "size of the whole model", falling=True, most=100)
    PAGE.write_text(render(lines), encoding="utf-8")
    print(PAGE.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
