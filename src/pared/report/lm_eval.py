"""Results of ``pared eval`` in the layout of lm-evaluation-harness (``results_*.json``), for tools that read it."""

import re
from collections.abc import Mapping
from typing import Any

NONE = "none"  # the name of the filter, where there is none
LOWER_IS_BETTER = ("perplexity",)


def in_lm_eval_layout(figures: Mapping[str, Any]) -> dict[str, Any]:
    """Return results as the harness writes them, as far as they were measured.

    Args:
        figures: what ``pared eval --json`` writes, with ``model``.

    Returns:
        Tasks, and a perplexity as a task of the name of its text. What pared does not know of a task, its version above
        all, is left out.
    """
    tasks = figures.get("tasks", ())
    results = {task["task"]: _metrics(task["metrics"], task["errors"], task["rows"]) for task in tasks}
    subtasks: dict[str, list[str]] = {name: [] for name in results}
    groups = {}
    for task in tasks:
        members = [part for part in task["answers"] if "task" in part]
        if members:
            groups[task["task"]] = results[task["task"]]
            subtasks[task["task"]] = [part["task"] for part in members]
            results |= {part["task"]: _metrics(part["metrics"], part["errors"], None) for part in members}
    counts = {task["task"]: task["rows"] for task in tasks}
    text = found_on_text(figures)
    if text is not None:
        results[str(text["text"])] = _metrics({"perplexity": text["perplexity"]}, {}, text["windows"])
        subtasks[str(text["text"])], counts[str(text["text"])] = [], text["windows"]
    shots = {task["task"]: task["shots"] for task in tasks}
    found: dict[str, Any] = {
        "results": results,
        "group_subtasks": subtasks,
        "configs": {name: {"task": name, "num_fewshot": shots.get(name, 0)} for name in counts},
        "versions": {},
        "n-shot": shots,
        "higher_is_better": {name: _better(own) for name, own in results.items()},
        "n-samples": {name: {"original": count, "effective": count} for name, count in counts.items()},
        "config": {
            "model": "pared",
            "model_args": {"pretrained": figures["model"]},
            "model_dtype": (text or figures)["dtype"],
            "device": figures.get("device"),
            "limit": figures.get("limit"),
            "random_seed": figures.get("seed"),
        },
        "transformers_version": figures.get("transformers"),
        "model_source": "pared",
        "model_name": figures["model"],
        "model_name_sanitized": re.sub(r"[\"<>:/|\\?*\[\]]+", "__", str(figures["model"])),
    }
    return {**found, "groups": groups} if groups else found


def found_on_text(figures: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Return what results of ``pared eval`` have of a text, None where perplexity was not measured."""
    return figures.get("perplexity_on") or (figures if "perplexity" in figures else None)


def _metrics(values: Mapping[str, float], errors: Mapping[str, float], rows: int | None) -> dict[str, Any]:
    found: dict[str, Any] = {} if rows is None else {"sample_len": rows}
    for name, value in values.items():
        found |= {f"{name},{NONE}": value, f"{name}_stderr,{NONE}": errors.get(name, "N/A")}
    return found


def _better(own: Mapping[str, Any]) -> dict[str, bool]:
    names = [key.partition(",")[0] for key in own if "," in key]
    return {name: name not in LOWER_IS_BETTER for name in names if not name.endswith("_stderr")}
