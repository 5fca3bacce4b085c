"""Encoders at a third of the ranks: SVD, FWSVD and Basel on SST-2, CoLA and WNUT-17, with and without more tuning.

``python benchmarks/encoders.py`` trains MiniLM for each task, compresses it and scores it on examples it never saw. A
cell whose line is there is not run again.
"""

import argparse
import os
import time
from itertools import product
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

import pared
from grid import signature
from pared import tune
from pared.data.encoding import cut_examples
from pared.data.labelled import find_examples
from pared.engine import plan_from_shapes, resolve
from pared.entrypoints.evaluation.fine_tune_encoder import FineTuning, fine_tune, with_head
from pared.evaluation import classify
from pared.models.source import find_model
from pared.schema.manifest import Manifest
from pared.schema.training import TrainingConfig
from record import RESULTS, append, read, table

LINES, PAGE = RESULTS / "encoders.jsonl", RESULTS / "encoders.md"
PLACE = Path(os.environ.get("PARED_CACHE", "~/.cache/pared")).expanduser() / "benchmarks" / "encoders"
FRACTION, LENGTH, BATCH, RATE = 0.33, 128, 32, 1e-4
# task -> training examples, those to score on, the metric, how many to train on, for how many epochs
TASKS: dict[str, tuple[str, str, str, int, int]] = {
    "SST-2": ("glue:sst2:train", "glue:sst2:dev", "accuracy", 10_000, 1),
    "CoLA": ("glue:cola:train", "glue:cola:dev", "matthews", 8_551, 3),
    "WNUT-17": ("ner:wnut17:train", "ner:wnut17:test", "f1", 3_394, 3),
}
BASEL = {"prunes": 20, "keeping_epochs": 0.5, "pruning_epochs": 0.5, "new": 4, "coefficient_rate": 20.0}


def windows_of(name: str, model: PreTrainedModel, tokenizer: Any, count: int | None) -> Any:
    """Return labelled examples, cut."""
    return cut_examples(find_examples(name), tokenizer, model.config, LENGTH, count)


def task_model(model: str, task: str) -> Path:
    """Return the folder of the model trained for a task."""
    out = PLACE / f"{task}-dense"
    if (out / "config.json").exists():
        return out
    train, _, _, count, epochs = TASKS[task]
    examples, tokenizer = find_examples(train), pared.load_tokenizer(model)
    built = with_head(model, examples)
    asked = FineTuning(epochs=epochs, learning_rate=RATE, batch=BATCH, length=LENGTH, examples=count)
    fine_tune(built, windows_of(train, built, tokenizer, count), asked)
    built.save_pretrained(out)
    tokenizer.save_pretrained(out)
    return out


def score(folder: Path, task: str) -> float:
    """Return the task's metric on examples that were never trained on."""
    model = pared.load(folder)
    _, test, metric, _, _ = TASKS[task]
    return classify(model, windows_of(test, model, pared.load_tokenizer(folder), None)).metrics[metric]


def tuning(parent: Path, out: Path, task: str, **more: Any) -> TrainingConfig:
    """Return what all trainings have in common."""
    train, _, _, count, _ = TASKS[task]
    return TrainingConfig.of({
        "model": str(parent), "out": str(out), "data": [train], "windows": count - 64, "validation": 64,
        "length": LENGTH, "batch": BATCH, "learning_rate": RATE, "evaluation": None, "checkpoint_every": 200, **more,
    })  # fmt: skip


def compressed(method: str, dense: Path, task: str, fraction: float) -> Path:
    """Return the folder of a method at a fraction of the ranks; Basel at as many parameters."""
    out = PLACE / f"{task}-{method}-{fraction:g}"
    if (out / "pared.json").exists():
        return out
    recipe = {"model": str(dense), "method": method, "rank_fraction": fraction, "out": str(out), "evaluation": None,
              "calibration": {"text": TASKS[task][0], "samples": 1024, "length": LENGTH}}  # fmt: skip
    if method == "basel":
        plan = plan_from_shapes(
            find_model(str(dense)).skeleton(), resolve(pared.Recipe(method="svd", rank_fraction=fraction))
        )
        tune(
            tuning(dense, out, task, method="basel", options={**BASEL, "keep": plan.achieved_keep, "post_epochs": 0.0})
        )
    else:
        pared.run(pared.Recipe.model_validate(recipe))
    return out


def key_of(line: dict[str, Any]) -> tuple[object, ...]:
    """Return what distinguishes a cell from every other."""
    fraction = line.get("fraction", 1.0 if line["what"] == "dense" else FRACTION)
    return line["what"], line["task"], line["tuned"], fraction


def render(lines: list[dict[str, Any]]) -> str:
    """Return the page."""
    tasks = [task for task in TASKS if any(line["task"] == task for line in lines)]
    found = {key_of(line): line for line in lines}
    rows = []
    for what, tuned, fraction in dict.fromkeys((key[0], key[2], key[3]) for key in map(key_of, lines)):
        own = [found.get((what, task, tuned, fraction)) for task in tasks]
        told = [f"{100 * line['score']:.1f}" if line else "" for line in own]
        share = next(line["keep"] for line in own if line)
        rows.append((what, "1 epoch" if tuned else "none", f"{fraction:g}", f"{share:.3f}", *told))
    header = (
        "method",
        "tuning",
        "rank fraction",
        "target parameters",
        *(f"{task} ({TASKS[task][2]})" for task in tasks),
    )
    return "\n".join([
        "# Encoders at a third of the ranks and less",
        "",
        "Made by `python benchmarks/encoders.py`; raw figures in [encoders.jsonl](encoders.jsonl). Do not edit.",
        "",
        f"`{lines[0]['model']}` with a head for each task, trained on it, then every linear layer of the blocks at a "
        "fraction of its full rank (0.33 is the FWSVD paper's budget; Basel at as many parameters), scored in percent "
        "on examples never trained on. Tuning is one more epoch of all parameters. Basel trains for an epoch while it "
        "compresses, which SVD and FWSVD do not. Of SST-2 10,000 examples are trained on.",
        "",
        table(header, rows),
        "",
        signature(lines),
    ])  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="embedded:minilm-l6")
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--methods", nargs="+", default=["dense", "svd", "fwsvd", "basel"])
    parser.add_argument("--fractions", type=float, nargs="+", default=[FRACTION])
    parser.add_argument("--untuned", action="store_true", help="without the rows that are tuned")
    parser.add_argument("--render", action="store_true")
    asked = parser.parse_args()
    for task in [] if asked.render else asked.tasks:
        for fraction, method in product(asked.fractions, asked.methods):
            for tuned in (False,) if method == "dense" or asked.untuned else (False, True):
                cell = {"what": method, "task": task, "tuned": tuned, "model": asked.model}
                cell["fraction"] = 1.0 if method == "dense" else fraction
                if any(key_of(cell) == key_of(line) for line in read(LINES)):
                    continue
                start = time.perf_counter()
                dense = task_model(asked.model, task)
                folder = dense if method == "dense" else compressed(method, dense, task, fraction)
                keep = 1.0 if method == "dense" else Manifest.read(folder).plan.achieved_keep
                if tuned:
                    parent, folder = folder, PLACE / f"{task}-{method}-{fraction:g}-tuned"
                    if not (folder / "pared.json").exists():
                        tune(tuning(parent, folder, task, method="full", options={"train": "all"}, schedule="linear"))
                row = {**cell, "keep": keep, "score": score(folder, task), "metric": TASKS[task][2]}
                append(LINES, {**row, "seconds": time.perf_counter() - start})
                print(row, flush=True)
    PAGE.write_text(render(read(LINES)), encoding="utf-8")
    print(PAGE.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
