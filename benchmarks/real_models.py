"""What compressed models of half a billion parameters can still do: perplexities, and programs that pass.

    PARED_DATA=/path/to/data python benchmarks/real_models.py                  # the grid, resuming where it stopped
    PARED_DATA=/path/to/data python benchmarks/real_models.py --what "svd-llm 0.8" --measures humaneval
    python benchmarks/real_models.py --render                                  # renders the page only

One JSON line for a model, a compression and a measure; what is there is not measured again. Models are calibrated on
Python source, what they are used for: the modules of the standard library, every second of them, the others being what
perplexity is measured on. Programs that a model writes are run, in the sandbox of ``pared eval``.
"""

import argparse
import time
from pathlib import Path
from typing import Any

import pared
from grid import evaluation_texts, signature
from models import PLACE, folder_of
from pared import tune
from pared.data.corpora import STDLIB
from pared.entrypoints.evaluate import evaluate
from pared.schema.evaluate import EvaluationConfig
from pared.schema.manifest import Manifest
from pared.schema.training import TrainingConfig
from record import RESULTS, Line, append, ranks_alone, read, table

LINES, PAGE = RESULTS / "real_models.jsonl", RESULTS / "real_models.md"
MODEL = "qwen2.5-coder-0.5b"
SAMPLES, LENGTH, WINDOWS = 96, 512, 10
GENERAL = "wikitext2:train"
DIAGONAL = {"output_weighting": "diagonal"}
RANKS = {**ranks_alone(**DIAGONAL), "keep": 0.8}
# Few tokens for Grams of 4,864 features: both are shrunk.
MIXED = {"method": "loss-optimal", "keep": 0.8, "structures": "mixed", "options": {
    **DIAGONAL, "input_shrinkage": 0.1, "output_shrinkage": 0.1,
}}  # fmt: skip
COMPRESSIONS: dict[str, dict[str, Any]] = {
    "mixed 0.8": MIXED,
    "mixed 0.8 refined": {**MIXED, "refine": {}},
    "ranks 0.8": RANKS,
    "widths 0.8": {**RANKS, "structures": "widths"},
    "svd-llm 0.8": {"method": "svd-llm", "keep": 0.8},
    "basis-sharing 0.8": {"method": "basis-sharing", "keep": 0.8},
    "wanda 0.5": {"method": "wanda", "sparsity": 0.5},
    "mixed 0.9": {**MIXED, "keep": 0.9},
    "mixed 0.8, general text": {**MIXED, "calibration": {"text": GENERAL}},
    "mixed 0.8, 384 windows": {**MIXED, "calibration": {"samples": 384}},
    "int8": {"quantize": "int8"},
    "int4": {"quantize": "int4"},
    "keep bytes 0.45": {"keep_bytes": 0.45},
    "keep bytes 0.35": {"keep_bytes": 0.35},
    "mixed 0.8, int8": {**MIXED, "quantize": "int8"},
}
MEASURES = ("WikiText-2", "C4", "Python", "humaneval")
CALIBRATED_ON, MEASURED_ON = STDLIB  # every second module each
# By the dense model's predictions alone, at a low rate; and by what was the best for SmolLM2 (recovery.md).
DISTILLED = {"method": "distill", "data": [CALIBRATED_ON], "length": LENGTH, "batch": 2, "tokens": 60_000,
             "learning_rate": 5e-6, "options": {"text": 0.0}}  # fmt: skip
AS_SMOLLM2 = {"method": "distill", "data": [CALIBRATED_ON], "length": LENGTH, "batch": 1, "tokens": 100_000}
TUNED: dict[str, tuple[str, dict[str, Any]]] = {
    "mixed 0.8 distilled": ("mixed 0.8", DISTILLED),
    "mixed 0.8 distilled, 3e-5": ("mixed 0.8", AS_SMOLLM2),
}


def compressed(what: str) -> str:
    """Return the folder of a compression, made if it is not there; ``dense`` is the model."""
    model = folder_of(MODEL)
    if what == "dense":
        return model
    out = PLACE / "real" / f"{MODEL}-{what.replace(',', '').replace(' ', '-')}"
    if (out / "pared.json").exists():
        return str(out)
    if what in TUNED:
        parent, training = TUNED[what]
        own = {**training, "model": compressed(parent), "evaluation": None, "out": str(out), "checkpoint_every": 50}
        tune(TrainingConfig.of(own), progress=True, resume=True)
    else:
        fields = COMPRESSIONS[what]
        calibration = {"text": CALIBRATED_ON, "samples": SAMPLES, "length": LENGTH, "batch": 4}
        recipe = {"model": model, "evaluation": None, "out": str(out), **fields}
        recipe["calibration"] = calibration | fields.get("calibration", {})
        pared.run(pared.Recipe.model_validate(recipe), progress=True, resume=True)
    return str(out)


def measure(what: str, name: str, batch_size: int) -> Line:
    """Return one figure of one compression, and what the folder holds; programs are written so many at a time."""
    folder, start = compressed(what), time.perf_counter()
    row: Line = {"model": MODEL, "what": what, "measure": name}
    if name == "humaneval":
        config = EvaluationConfig(tasks=["humaneval"], allow_code_execution=True, batch_size=batch_size)
        (found,) = evaluate(folder, config, tell=lambda told: print(told, flush=True))["tasks"]
        passed = [any(verdict["pass"] for verdict in one["verdicts"]) for one in found["answers"]]
        row |= {"value": found["metrics"]["pass@1"], "error": found["errors"]["pass@1"], "rows": found["rows"],
                "passed": passed}  # fmt: skip
    else:
        texts = {**evaluation_texts(), "Python": MEASURED_ON}
        model, tokenizer = pared.load(folder), pared.load_tokenizer(folder)
        row |= {"value": pared.perplexity(model, tokenizer, texts[name], LENGTH, WINDOWS).value}
    row |= {"evaluate_seconds": time.perf_counter() - start}
    if what != "dense":
        made = Manifest.read(Path(folder))
        trained = sum(sum(one.seconds.values()) for one in made.training)  # of a killed training its last try alone
        seconds = {**made.seconds, "training": trained}
        row |= {"made": {"seconds": seconds, "bytes": made.bytes_on_disk, "bytes_before": made.bytes_before,
                         "parameters": made.plan.model_parameters, "keep": made.plan.achieved_keep}}  # fmt: skip
    return row


def row_of(what: str, lines: list[Line], dense: dict[str, float]) -> tuple[object, ...]:
    """Return a row of the page."""
    found = {line["measure"]: line for line in lines if line["what"] == what}
    made = next(iter(found.values())).get("made")
    cells: list[object] = [what, "" if made is None else f"{made['bytes'] / made['bytes_before']:.2f}"]
    for text in MEASURES[:-1]:
        value = found.get(text, {}).get("value")
        cells.append("" if value is None else f"{value:,.2f} ({value / dense[text]:.2f} x)")
    tasks = found.get("humaneval")
    cells.append("" if tasks is None else f"{tasks['value']:.3f} ± {tasks['error']:.3f}, {sum(tasks['passed'])} of "
                 f"{tasks['rows']}")  # fmt: skip
    share = "" if tasks is None or "humaneval" not in dense else f"{tasks['value'] / dense['humaneval']:.0%}"
    return (*cells, share, "" if made is None else f"{sum(made['seconds'].values()) / 60:.0f}")


def render(lines: list[Line]) -> str:
    """Return the page."""
    dense = {line["measure"]: line["value"] for line in lines if line["what"] == "dense"}
    header = ("", "bytes", *(f"perplexity on {text}" for text in MEASURES[:-1]), "HumanEval pass@1", "of dense",
              "minutes to make")  # fmt: skip
    names = [what for what in ("dense", *COMPRESSIONS, *TUNED) if any(line["what"] == what for line in lines)]
    return "\n".join([
        "# What compressed models can still do",
        "",
        "Made by `python benchmarks/real_models.py`; raw figures in [real_models.jsonl](real_models.jsonl).",
        "",
        f"Qwen2.5-Coder-0.5B-Instruct in bfloat16, calibrated on {SAMPLES} x {LENGTH} tokens of Python source (every "
        f"second module of the standard library; *general text*: {GENERAL}); `refined`: every block was trained on the "
        f"same tokens to output what the dense one does; `distilled`: trained on {DISTILLED['tokens']:,} tokens of the "
        "same source, two windows a step, by the dense model's predictions alone and at "
        f"{DISTILLED['learning_rate']:g} (`3e-5`: on {AS_SMOLLM2['tokens']:,} tokens, one window a step, with the "
        "defaults of `pared tune`, half by the text); the others without training. "
        f"`mixed`: both Grams shrunk by 0.1. Perplexity on {WINDOWS} windows of {LENGTH} tokens each; *Python* is the "
        "modules that were not "
        "calibrated on. HumanEval: "
        "all rows, the likeliest token, no examples. *bytes* is of the weights on disk, dense being 1. The machine was "
        "shared by other work, so minutes say little.",
        "",
        table(header, [row_of(what, lines, dense) for what in names]),
        "",
        signature(lines),
    ])  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    every = ["dense", *COMPRESSIONS, *TUNED]
    parser.add_argument("--what", nargs="+", default=every, choices=every)
    parser.add_argument("--measures", nargs="+", default=list(MEASURES), choices=MEASURES)
    parser.add_argument("--batch-size", type=int, default=8, help="programs that are written at a time")
    parser.add_argument("--render", action="store_true")
    asked = parser.parse_args()
    for what in () if asked.render else asked.what:
        for name in asked.measures:
            key = {"model": MODEL, "what": what, "measure": name}
            if not any(key.items() <= line.items() for line in read(LINES)):
                append(LINES, measure(what, name, asked.batch_size))
                print(key, read(LINES)[-1]["value"], flush=True)
    PAGE.write_text(render(read(LINES)), encoding="utf-8")


if __name__ == "__main__":
    main()
