"""Rows of the benchmark LowRankArena: perplexities, nine tasks and what is retained, in the form of its tables.

    python benchmarks/lowrankarena.py --model meta-llama/Llama-3.1-8B       # the grid, resuming where it stopped
    python benchmarks/lowrankarena.py --methods dense mixed --keeps 0.8 --limit 100 --samples 32
    python benchmarks/lowrankarena.py --render                              # renders the page only

Compressed by the preset ``lowrankarena``, and measured as its repository says (benchmark/ppl.yaml, mcq.yaml,
base/tasks): blocks of 2,048 tokens of WikiText-2's test split and of the first 262,144 tokens of C4's validation split;
seven tasks and MathQA without examples, ``acc_norm`` where there is one; five subjects of MMLU with five examples. One
JSON line a cell; what is there is not measured again. ``lowrankarena.csv`` beside this file holds its published rows.
"""

import argparse
import csv
import os
import time
from pathlib import Path
from typing import Any

import pared
from grid import signature
from pared.data import find_text
from pared.evaluation.multiple_choice import evaluate_choices, prepare
from pared.progress import Silent
from record import RESULTS, Line, append, read, table

LINES, PAGE = RESULTS / "lowrankarena.jsonl", RESULTS / "lowrankarena.md"
PUBLISHED = Path(__file__).with_suffix(".csv")
PLACE = Path(os.environ.get("PARED_CACHE", "~/.cache/pared")).expanduser() / "benchmarks" / "lowrankarena"
TEXTS = {"wt2": ("wikitext2:test", None), "c4": ("c4:validation", 262_144 // 2048)}
CHOICES = ("boolq", "arc_easy", "arc_challenge", "winogrande", "piqa", "hellaswag", "openbookqa")
MATHEMATICS = ("abstract_algebra", "college_mathematics", "elementary_mathematics", "high_school_mathematics",
               "high_school_statistics")  # fmt: skip
MEASURES = (*TEXTS, *CHOICES, "mathqa", "mmlu_math")
METHODS: dict[str, dict[str, Any]] = {
    "mixed": {"method": "loss-optimal", "structures": "mixed", "options": {"output_weighting": "diagonal"}},
    "mixed, refined": {"method": "loss-optimal", "structures": "mixed", "options": {"output_weighting": "diagonal"},
                       "refine": {}},
    "ranks": {"method": "loss-optimal", "structures": "ranks", "options": {"output_weighting": "diagonal"}},
    "svd-llm": {"method": "svd-llm"},
    "basis-sharing": {"method": "basis-sharing"},
    "modegpt": {"method": "modegpt"},
}  # fmt: skip
HEADER = ("Keep", "Method", "WT2 PPL", "C4 PPL", "BoolQ", "ARC-E", "ARC-C", "WinoG.", "PIQA", "HellaS.", "OBQA",
          "MCQ Avg.", "MathQA", "MMLU-M", "Q. Ret.")  # fmt: skip


def folder_of(model: str, method: str, keep: float, samples: int | None) -> str:
    """Return the folder of a compression, made if it is not there."""
    if method == "dense":
        return model
    short = model.strip("/").replace(":", "-").split("/")[-1]
    out = PLACE / f"{short}-{method.replace(', ', '-')}-{keep:g}-{samples or 'all'}"
    if not (out / "pared.json").exists():
        preset = "lowrankarena"
        calibration = {} if samples is None else {"calibration": {"samples": samples}}
        recipe = {"model": model, "preset": preset, "keep": keep, "evaluation": None, "out": str(out)}
        pared.run(pared.Recipe.of({**recipe, **calibration, **METHODS[method]}), progress=True, resume=True)
    return str(out)


def measure(folder: str, name: str, limit: int | None) -> dict[str, Any]:
    """Return one figure of a model, how many rows or windows it is of, and the seconds it took."""
    start = time.perf_counter()
    if name in TEXTS:
        text, windows = TEXTS[name]
        find_text(text)  # what is missing is told before a model is loaded
        model, tokenizer = pared.load(folder), pared.load_tokenizer(folder)
        found = pared.perplexity(model, tokenizer, text, 2048, windows)
        return {"value": found.value, "count": len(found.by_window), "evaluate_seconds": time.perf_counter() - start}
    subjects = [f"mmlu_{subject}" for subject in MATHEMATICS] if name == "mmlu_math" else [name]
    prepared = prepare(subjects, shots=5 if name == "mmlu_math" else None, limit=limit)
    model, tokenizer = pared.load(folder), pared.load_tokenizer(folder)
    results = evaluate_choices(model, tokenizer, prepared, Silent().stage)
    rows = sum(one.rows for one in results)
    value = sum(one.metrics.get("acc_norm", one.metrics["acc"]) * one.rows for one in results) / rows
    return {"value": value, "count": rows, "evaluate_seconds": time.perf_counter() - start}


def retained(row: dict[str, float], dense: dict[str, float]) -> float | None:
    """Return the mean share of the dense model's: two perplexities, seven tasks as one, MathQA, mathematics of MMLU."""
    if any(name not in one for name in MEASURES for one in (row, dense)):
        return None
    lower = [dense[name] / row[name] for name in TEXTS]
    choices = mean_of_choices(row) / mean_of_choices(dense)
    higher = [row[name] / dense[name] for name in ("mathqa", "mmlu_math")]
    return sum((*lower, choices, *higher)) / 5


def mean_of_choices(row: dict[str, float]) -> float:
    """Return the mean of the seven tasks."""
    return sum(row[name] for name in CHOICES) / len(CHOICES)


def cells(keep: float, method: str, row: dict[str, float], dense: dict[str, float]) -> tuple[str, ...]:
    """Return a row as its tables have it, empty where nothing was measured."""

    def told(name: str) -> str:
        return "" if name not in row else f"{row[name]:.2f}" if name in TEXTS else f"{row[name]:.3f}"

    choices = f"{mean_of_choices(row):.3f}" if all(name in row for name in CHOICES) else ""
    kept = retained(row, dense)
    share = "" if kept is None else f"{kept:.3f}"
    return (f"{keep:.0%}", method, *map(told, (*TEXTS, *CHOICES)), choices, told("mathqa"), told("mmlu_math"), share)


def published() -> dict[str, list[tuple[float, str, dict[str, float]]]]:
    """Return the published rows by model."""
    found: dict[str, list[tuple[float, str, dict[str, float]]]] = {}
    with PUBLISHED.open(encoding="utf-8") as file:
        for row in csv.DictReader(file):
            values = {name: float(row[name]) for name in MEASURES}
            found.setdefault(row["model"], []).append((float(row["keep"]), row["method"], values))
    return found


def of_dense(rows: list[tuple[float, str, dict[str, float]]]) -> list[tuple[str, ...]]:
    """Return perplexities as multiples of the dense model's."""
    dense = next(values for keep, _, values in rows if keep == 1)
    return [
        (f"{keep:.0%}", method, *(f"{values[name] / dense[name]:.2f} x" if name in values else "" for name in TEXTS))
        for keep, method, values in rows
        if keep < 1
    ]


def render(lines: list[Line]) -> str:
    """Return the page."""
    text = [
        "# LowRankArena",
        "",
        "Made by `python benchmarks/lowrankarena.py`; raw figures in [lowrankarena.jsonl](lowrankarena.jsonl). Do not "
        "edit. Compressed by `--preset lowrankarena` and measured as LowRankArena (Zishan-Shao/lowrankarena, "
        "04ce4b6) measures; its published rows are of models of 7 and 8 billion parameters, which take a GPU: whoever "
        "has one gets rows of the same form from the script. What was measured here is of a model of "
        "another size, so that multiples of the dense perplexity are to be compared, and those with care. *Q. Ret.* is "
        "the mean share of the dense model's: of both perplexities, MCQ Avg., MathQA and MMLU-M.",
        "",
    ]
    ratios: list[tuple[str, ...]] = []
    for model in dict.fromkeys(line["model"] for line in lines):
        own = [line for line in lines if line["model"] == model]
        rows: dict[tuple[float, str], dict[str, float]] = {}
        for line in own:
            rows.setdefault((line["keep"], line["method"]), {})[line["measure"]] = line["value"]
        dense = rows.get((1.0, "dense"), {})
        ordered = sorted(rows.items(), key=lambda item: (-item[0][0], [*METHODS, "dense"].index(item[0][1])))
        counts = {
            line["measure"]: f"{line['count']:,} {'windows' if line['measure'] in TEXTS else 'rows'}" for line in own
        }
        samples = ", ".join(sorted({str(line["samples"] or "256") for line in own if line["method"] != "dense"}))
        text += [
            f"## {model}",
            "",
            f"Calibrated on {samples} x 2048 tokens of WikiText-2; measured on "
            + ", ".join(
                f"{count:,} {'windows' if name in TEXTS else 'rows'} of {name}" for name, count in counts.items()
            )
            + ".",
            "",
            table(HEADER, [cells(keep, method, row, dense) for (keep, method), row in ordered]),
            "",
        ]
        if dense:
            every = [(keep, method, row) for (keep, method), row in ordered]
            ratios += [(model, *row) for row in of_dense(every)]
    theirs = published()
    ratios += [(model, *row) for model, rows in theirs.items() for row in of_dense(rows)]
    text += ["## Perplexities as multiples of the dense model's", "",
             table(("Model", "Keep", "Method", "WT2", "C4"), ratios), ""]  # fmt: skip
    for model, rows in theirs.items():
        dense = rows[0][2]
        text += [f"## {model}, published", "", table(HEADER, [cells(*row, dense) for row in rows]), ""]
    return "\n".join([*text, signature(lines)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="embedded:smollm2-135m")
    parser.add_argument("--methods", nargs="+", default=["dense", *METHODS], choices=["dense", *METHODS])
    parser.add_argument("--keeps", nargs="+", type=float, default=[0.8, 0.6])
    parser.add_argument("--measures", nargs="+", default=list(MEASURES), choices=MEASURES)
    parser.add_argument("--samples", type=int, help="windows to calibrate on; 256 if not given")
    parser.add_argument("--limit", type=int, help="rows of a task, and of a subject; all if not given")
    parser.add_argument("--render", action="store_true")
    asked = parser.parse_args()
    todo = [(method, keep) for keep in asked.keeps for method in asked.methods if method != "dense"]
    if "dense" in asked.methods:
        todo.insert(0, ("dense", 1.0))
    for method, keep in () if asked.render else todo:
        for name in asked.measures:
            about = {"model": asked.model, "method": method, "keep": keep, "measure": name, "limit": asked.limit,
                     "samples": None if method == "dense" else asked.samples}  # fmt: skip
            if any(about.items() <= line.items() for line in read(LINES)):
                continue
            row = measure(folder_of(asked.model, method, keep, asked.samples), name, asked.limit)
            append(LINES, {**about, **row})
            print(f"{method} {keep:g} {name}: {row['value']:.4f} of {row['count']}", flush=True)
    PAGE.write_text(render(read(LINES)), encoding="utf-8")
    print(PAGE.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
