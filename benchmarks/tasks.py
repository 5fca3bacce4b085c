"""What compressed models can still do: ten multiple-choice tasks, dense and compressed, beside the plain harness.

    PARED_DATA=/path/to/data python benchmarks/tasks.py                      # the grid, resuming where it stopped
    PARED_DATA=/path/to/data python benchmarks/tasks.py --models dense plain --tasks arc_easy piqa
    python benchmarks/tasks.py --render                                      # renders the page only

One JSON line for a model and a task. ``plain`` is lm-evaluation-harness by itself: its own definitions of the tasks,
its own loading of a plain dense folder, the same rows in the columns of the original data sets. Only the rows come from
here.
"""

import argparse
import os
import time
from collections.abc import Callable
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset

import pared
from grid import signature
from pared.entrypoints.export import export_dense
from pared.evaluation.multiple_choice import evaluate_choices, prepare
from pared.progress import Silent
from record import RESULTS, Line, append, ranks_alone, read, table

LINES, PAGE = RESULTS / "tasks.jsonl", RESULTS / "tasks.md"
PLACE = Path(os.environ.get("PARED_CACHE", "~/.cache/pared")).expanduser() / "benchmarks" / "tasks"
TASKS = ("arc_easy", "arc_challenge", "openbookqa", "hellaswag", "piqa", "winogrande", "boolq", "rte", "mathqa",
         "lambada_openai")  # fmt: skip
CALIBRATION = {"text": "wikitext2:train", "samples": 64, "length": 1024}
FOUND = {"allocation": "dsa", "allocation_options": {"program": "found-wanda-0.7"}}
MODELS: dict[str, dict[str, Any]] = {
    "svd-llm 0.8": {"method": "svd-llm", "keep": 0.8},
    "basis-sharing 0.8": {"method": "basis-sharing", "keep": 0.8},
    "loss-optimal 0.8": {**ranks_alone(), "keep": 0.8},
    "loss-optimal 0.6": {**ranks_alone(), "keep": 0.6},
    "wanda 0.5": {"method": "wanda", "sparsity": 0.5},
    "wanda 0.6": {"method": "wanda", "sparsity": 0.6},
    "wanda 0.6, dsa-found": {"method": "wanda", "sparsity": 0.6, **FOUND},
}
BATCH = 8


def folder_of(model: str, name: str) -> str:
    """Return the folder of a compression, made if it is not there."""
    if name == "dense":
        return model
    out = PLACE / name.replace(" ", "-").replace(",", "")
    if not (out / "pared.json").exists():
        pared.run(pared.Recipe.model_validate({"model": model, "calibration": CALIBRATION, "evaluation": None,
                                               "out": str(out), **MODELS[name]}))  # fmt: skip
    return str(out)


def measure(model: str, name: str, task: str, limit: int) -> Line:
    """Return how one model does one task."""
    prepared, start = prepare([task], limit=limit), time.perf_counter()
    if name == "plain":
        metrics, errors, rows = plain(model, prepared.loaded["tasks"][task], limit)
    else:
        folder = folder_of(model, name)
        loaded, tokenizer = pared.load(folder, "float32"), pared.load_tokenizer(folder)
        (found,) = evaluate_choices(loaded, tokenizer, prepared, Silent().stage, BATCH)
        metrics, errors, rows = found.metrics, found.errors, found.rows
    return {"model": model, "what": name, "task": task, "limit": limit, "rows": rows, "metrics": metrics,
            "errors": errors, "seconds": time.perf_counter() - start}  # fmt: skip


# The plain harness: its definition of a task, and a row as the original data set has it.
Row = dict[str, Any]
LETTERS = "ABCDE"


def _labelled(row: Row, question: str) -> Row:
    texts = row["choices"]
    return {question: row.get("question", row.get("query")), "answerKey": LETTERS[row["gold"]],
            "choices": {"text": texts, "label": list(LETTERS[: len(texts)])}}  # fmt: skip


def _hellaswag(row: Row) -> Row:
    activity, _, context = row["query"].partition(": ")
    return {"activity_label": activity, "ctx_a": context, "ctx_b": "", "endings": row["choices"], "label": row["gold"]}


def _piqa(row: Row) -> Row:
    goal = row["query"].removeprefix("Question: ").removesuffix("\n")
    return {"goal": goal, "sol1": row["choices"][0], "sol2": row["choices"][1], "label": row["gold"]}


def _winogrande(row: Row) -> Row:
    one, other = row["context_options"]
    same = takewhile(lambda words: words[0] == words[1], zip(one.split(" "), other.split(" "), strict=False))
    shared = "".join(f"{word} " for word, _ in same)
    return {"sentence": f"{shared}_ {row['continuation']}", "option1": one.removeprefix(shared),
            "option2": other.removeprefix(shared), "answer": str(row["gold"] + 1)}  # fmt: skip


def _boolq(row: Row) -> Row:
    passage, _, question = row["query"].removeprefix("Passage: ").rpartition("\nQuestion: ")
    return {"passage": passage, "question": question.removesuffix("?"), "label": row["gold"]}


def _mathqa(row: Row) -> Row:
    options = " , ".join(f"{letter} ) {text}" for letter, text in zip("abcde", row["choices"], strict=True))
    return {"Problem": row["question"], "options": options, "correct": "abcde"[row["gold"]]}


ORIGINAL: dict[str, tuple[str, Callable[[Row], Row]]] = {
    "arc_easy": ("arc/arc_easy.yaml", lambda row: _labelled(row, "question")),
    "arc_challenge": ("arc/arc_challenge.yaml", lambda row: _labelled(row, "question")),
    "openbookqa": ("openbookqa/openbookqa.yaml", lambda row: _labelled(row, "question_stem")),
    "hellaswag": ("hellaswag/hellaswag.yaml", _hellaswag),
    "piqa": ("piqa/piqa.yaml", _piqa),
    "winogrande": ("winogrande/default.yaml", _winogrande),
    "boolq": ("super_glue/boolq/default.yaml", _boolq),
    "rte": ("glue/rte/default.yaml", lambda row: {**row, "label": int(row["label"] == "not_entailment")}),
    "mathqa": ("mathqa/mathqa.yaml", _mathqa),
    "lambada_openai": ("lambada/lambada_openai.yaml", lambda row: {"text": f"{row['context']} {row['continuation']}"}),
}


def plain(model: str, ours: Any, limit: int) -> tuple[dict[str, float], dict[str, float], int]:
    """Return metrics, standard errors and rows of the harness by itself, on the rows of our task."""
    import lm_eval
    import lm_eval.tasks
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.tasks._yaml_loader import load_yaml

    folder = PLACE / "dense"
    if not (folder / "config.json").exists():
        export_dense(model, folder)
    name = ours.config.task
    where, original = ORIGINAL[name]
    config = load_yaml(Path(lm_eval.tasks.__file__).parent / where, resolve_func=True)
    rows = Dataset.from_list([original(row) for row in ours.test_docs().select(range(limit))])
    splits = [config.get(f"{part}_split") for part in ("training", "validation", "test")]
    task = ConfigurableTask(config={**config, "custom_dataset": lambda **_: {s: rows for s in splits if s}})
    found = lm_eval.simple_evaluate(
        model="hf", model_args={"pretrained": str(folder), "dtype": "float32"}, tasks=[task], device="cpu",
        batch_size=1, bootstrap_iters=100,
    )["results"][name]  # fmt: skip
    values = {key.partition(",")[0]: value for key, value in found.items() if "," in key}
    metrics = {key: float(value) for key, value in values.items() if not key.endswith("_stderr")}
    return metrics, {key: float(values[f"{key}_stderr"]) for key in metrics}, len(rows)


def told(line: Line) -> str:
    """Return what a page says of a line: the metric papers give, in percent, with its standard error."""
    metric = "acc_norm" if "acc_norm" in line["metrics"] else "acc"
    return f"{100 * line['metrics'][metric]:.1f} ± {100 * line['errors'][metric]:.1f}"


def render(lines: list[Line]) -> str:
    """Return the page."""
    found = {(line["what"], line["task"]): line for line in lines}
    tasks = [task for task in TASKS if ("dense", task) in found]
    names = [name for name in ("dense", *MODELS) if any((name, task) in found for task in tasks)]
    rows = []
    for name in names:
        own = [found.get((name, task)) for task in tasks]
        whole = all(own)
        mean = sum(float(told(line).split()[0]) for line in own if line) / len(own) if whole else None
        rows.append((name, *(told(line) if line else "" for line in own), f"{mean:.1f}" if mean is not None else ""))
    beside = []
    for task in tasks:
        ours, theirs = found["dense", task], found.get(("plain", task))
        for metric, value in ours["metrics"].items() if theirs else ():
            apart = abs(value - theirs["metrics"][metric])
            error = max(ours["errors"][metric], 1e-12)
            beside.append((task, metric, f"{value:.4f}", f"{theirs['metrics'][metric]:.4f}", f"{apart / error:.2f}"))
    return "\n".join([
        "# Tasks",
        "",
        "Made by `python benchmarks/tasks.py`; raw figures in [tasks.jsonl](tasks.jsonl). Do not edit.",
        "",
        f"`{lines[0]['model']}` in float32, the first {lines[0]['limit']} rows of every task, no examples shown; "
        "accuracy in percent (by length where the harness has it, `acc_norm`) with its standard error. Compressed "
        f"models are calibrated on {CALIBRATION['samples']} x {CALIBRATION['length']} tokens of {CALIBRATION['text']} "
        "and not trained.",
        "",
        table(("model", *tasks, "mean"), rows),
        "",
        "## Beside the plain harness",
        "",
        "The dense model by `pared eval --tasks` and by lm-evaluation-harness alone: its own definitions, its own "
        "loading of a plain folder, one row at a time; the same rows. How far apart they are is given in standard "
        "errors.",
        "",
        table(("task", "metric", "pared", "plain harness", "apart"), beside),
        "",
        signature(lines),
    ])  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="embedded:smollm2-135m")
    names = ["dense", "plain", *MODELS]
    parser.add_argument("--models", nargs="+", default=names, choices=names)
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=TASKS)
    parser.add_argument("--limit", type=int, default=100)
    parser.add_argument("--render", action="store_true")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    for name in asked.models if not asked.render else ():
        for task in asked.tasks:
            key = {"model": asked.model, "what": name, "task": task, "limit": asked.limit}
            if not any(key.items() <= line.items() for line in read(LINES)):
                row = measure(asked.model, name, task, asked.limit)
                append(LINES, row)
                print(name, told(row), f"{task}, {row['seconds']:.0f} s", flush=True)
    PAGE.write_text(render(read(LINES)), encoding="utf-8")
    print(PAGE.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
