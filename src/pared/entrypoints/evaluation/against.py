"""Results of ``pared eval`` beside those of another model: row by row, as far as both did the same rows."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from pared.errors import ParedError
from pared.evaluation.compared import Difference, paired_difference, perplexity_quotient
from pared.evaluation.pass_at_k import pass_at_k
from pared.names import called
from pared.report.lm_eval import found_on_text
from pared.schema.evaluate import EvaluationConfig

Figures = Mapping[str, Any]
SAME_TASK = ("limit", "shots", "data")  # what tasks must agree on to be of the same rows


def require_comparable(config: EvaluationConfig, theirs: Figures) -> None:
    """Refuse to compare with results of other rows, before anything is measured.

    Args:
        config: what is to be measured.
        theirs: results of ``pared eval``.

    Raises:
        ParedError: nothing that is measured is in them, or it was measured of other rows.
    """
    text, tasks = found_on_text(theirs), {one["task"] for one in theirs.get("tasks", ())} & set(config.tasks or ())
    if not tasks and (text is None or config.perplexity is None):
        raise ParedError(f"{called('against')}: the results of {theirs['model']} have {', '.join(_named(theirs))}, and "
                         "nothing of what is measured")  # fmt: skip
    for name in ("limit", "shots") if tasks else ():
        if getattr(config, name) != theirs.get(name):
            raise ParedError(f"{called('against')}: tasks of {theirs['model']} were done with {called(name)} "
                             f"{theirs.get(name)}, got {getattr(config, name)}")  # fmt: skip


def differences(ours: Figures, theirs: Figures) -> list[dict[str, Any]]:
    """Return every figure that both have, with its paired difference.

    Args:
        ours: results of ``pared eval``.
        theirs: of the other model.

    Raises:
        ParedError: rows or windows are not the same, or no figure is in both.
    """
    found = [*_perplexities(ours, theirs), *_tasks(ours, theirs)]
    if not found:
        raise ParedError(f"nothing that was measured of {ours['model']} is in the results of {theirs['model']}: "
                         f"got {', '.join(_named(ours))} and {', '.join(_named(theirs))}")  # fmt: skip
    return found


def in_words(difference: Figures) -> str:
    """Return a difference in a line."""
    one, other, value = difference["value"], difference["against"], Difference(**difference["difference"])
    if difference["metric"] == "perplexity":
        change = f"{value.value:.4f} times, 95% from {value.low:.4f} to {value.high:.4f} over {value.rows:,} windows"
    else:
        change = f"{value.value:+.4f}, 95% from {value.low:+.4f} to {value.high:+.4f} over {value.rows:,} rows"
        if value.p is not None:
            change += f"; {value.better:,} gained, {value.worse:,} lost, p {value.p:.3g} (McNemar)"
    return f"{difference['task']}: {difference['metric']} {one:.4f} against {other:.4f}: {change}"


def _named(figures: Figures) -> list[str]:
    text = found_on_text(figures)
    return [*([f"perplexity on {text['text']}"] if text else []), *(one["task"] for one in figures.get("tasks", ()))]


def _perplexities(ours: Figures, theirs: Figures) -> list[dict[str, Any]]:
    one, other = found_on_text(ours), found_on_text(theirs)
    if one is None or other is None or one["text"] != other["text"]:
        return []
    for name in ("text", "length", "windows", "stride", "bos", "protocol", "digest"):
        if one.get(name) != other.get(name):
            raise ParedError(f"perplexities on {one['text']} are of other windows: {name} is {one.get(name)!s:.60} and "
                             f"{other.get(name)!s:.60}; perplexities of models with other tokenizers do not "
                             "compare")  # fmt: skip
    if "by_window" not in one or "by_window" not in other:
        old = theirs if "by_window" in one else ours
        raise ParedError(f"the results of {old['model']} were written by an earlier version, without windows; measure "
                         "it again")  # fmt: skip
    found = perplexity_quotient(one["by_window"], other["by_window"])
    return [_entry(str(one["text"]), "perplexity", one["perplexity"], other["perplexity"], found)]


def _tasks(ours: Figures, theirs: Figures) -> list[dict[str, Any]]:
    found = []
    others = {one["task"]: one for one in theirs.get("tasks", ())}
    for one in ours.get("tasks", ()):
        other = others.get(one["task"])
        if other is None:
            continue
        for name in SAME_TASK:
            if ours.get(name) != theirs.get(name):
                raise ParedError(f"task {one['task']} was done with other rows or prompts: {name} is {ours.get(name)} "
                                 f"and {theirs.get(name)}")  # fmt: skip
        for metric in (name for name in one["metrics"] if name in other["metrics"]):
            mine, its = by_row(one, metric), by_row(other, metric)
            if mine and len(mine) == len(its):
                entry = _entry(one["task"], metric, one["metrics"][metric], other["metrics"][metric],
                               paired_difference(mine, its))  # fmt: skip
                found.append(entry)
    return found


def _entry(task: str, metric: str, one: float, other: float, found: Difference) -> dict[str, Any]:
    return {"task": task, "metric": metric, "value": one, "against": other, "difference": asdict(found)}


def by_row(result: Figures, metric: str) -> list[float]:
    """Return a metric of a task by row, none where rows were not kept or the metric is no mean over them."""
    if metric == "perplexity":  # of a task: not a mean over rows
        return []
    found: list[float] = []
    for answer in result["answers"]:
        if "task" in answer:  # of a group, what each of its tasks found
            found += answer.get("by_row", {}).get(metric, ())
        else:
            found += _values(answer["verdicts"], metric)
    return found


def _values(verdicts: Figures | Sequence[Figures], metric: str) -> list[float]:
    """Return what a row counts for a metric."""
    if isinstance(verdicts, Mapping):
        return [float(verdicts[metric])] if metric in verdicts else []
    if metric.startswith("pass@"):
        right = sum(bool(one["pass"]) for one in verdicts)
        return [pass_at_k(len(verdicts), right, int(metric.removeprefix("pass@")))]
    return [sum(float(one[metric]) for one in verdicts) / len(verdicts)]
