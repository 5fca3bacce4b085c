"""``pared eval --against`` compares row by row, and refuses to compare what is not the same."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_models import TINY_MODELS
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

from pared.cli.commands import app
from pared.entrypoints.evaluation import evaluating
from pared.entrypoints.evaluation.against import by_row, differences, in_words, require_comparable
from pared.errors import ParedError
from pared.schema.evaluate import EvaluationConfig


def figures(model: str, right: list[int], nats: list[float]) -> dict[str, Any]:
    answers = [{"row": row, "verdicts": [{"last_number": bool(one)}]} for row, one in enumerate(right)]
    task = {"task": "svamp", "metrics": {"last_number": sum(right) / len(right)}, "answers": answers}
    text = {"text": "t", "length": 8, "windows": len(nats), "digest": "d", "perplexity": 2.0}
    text["by_window"] = [[one, 7] for one in nats]
    return {"model": model, "limit": None, "shots": None, "data": "d", "tasks": [task], "perplexity_on": text}


def test_every_figure_of_both_is_compared_and_said_in_a_line() -> None:
    ours, theirs = figures("a", [1, 1, 1, 0], [7.0, 14.0]), figures("b", [1, 0, 0, 0], [14.0, 21.0])
    text, task = differences(ours, theirs)
    assert (text["task"], text["metric"], text["difference"]["rows"]) == ("t", "perplexity", 2)
    assert text["difference"]["value"] == pytest.approx(2.718281828**-1)
    assert (task["value"], task["against"], task["difference"]["value"]) == (0.75, 0.25, 0.5)
    assert (task["difference"]["better"], task["difference"]["worse"], task["difference"]["p"]) == (2, 0, 0.5)
    assert in_words(task).startswith("svamp: last_number 0.7500 against 0.2500: +0.5000, 95% from ")
    assert in_words(task).endswith("over 4 rows; 2 gained, 0 lost, p 0.5 (McNemar)")
    assert "perplexity 2.0000 against 2.0000: 0.3679 times, 95% from 0.3679 to 0.3679 over 2 windows" in in_words(text)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda other: other.update(limit=3), "other rows or prompts: limit is None and 3"),
        (lambda other: other["perplexity_on"].update(digest="e"), "other windows: digest is d and e"),
        (lambda other: other["perplexity_on"].pop("by_window"), "results of b were written by an earlier version"),
        (lambda other: (other.pop("tasks"), other.pop("perplexity_on")), "nothing that was measured of a"),
    ],
)
def test_what_is_not_the_same_is_not_compared(change: Callable[[dict[str, Any]], object], message: str) -> None:
    other = figures("b", [1, 0], [1.0])
    change(other)
    with pytest.raises(ParedError, match=message):
        differences(figures("a", [1, 1], [2.0]), other)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"tasks": ("svamp",), "limit": 2}, "done with limit None, got 2"),
        ({"tasks": ("gsm8k",)}, "have perplexity on t, svamp, and nothing of what is measured"),
    ],
)
def test_results_of_other_rows_are_refused_before_anything_is_measured(asked: dict[str, Any], message: str) -> None:
    with pytest.raises(ParedError, match=message):
        require_comparable(EvaluationConfig(**asked), figures("b", [1], [1.0]))


def test_rows_of_groups_of_choices_and_of_samples_are_found() -> None:
    group = {"answers": [{"task": "law", "by_row": {"acc": [1.0, 0.0]}}, {"task": "art", "by_row": {"acc": [1.0]}}]}
    assert by_row(group, "acc") == [1.0, 0.0, 1.0]
    assert by_row({"answers": [{"verdicts": {"acc": 1.0}}]}, "acc") == [1.0]
    drawn = [{"pass": True}, {"pass": False}]
    assert by_row({"answers": [{"verdicts": drawn}]}, "pass@1") == [0.5]


@pytest.fixture
def place(tmp_path: Path, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("a", "b"):
        model = TINY_MODELS["llama"]()
        model.config.max_position_embeddings = 512
        if name == "b":
            model.lm_head.weight.data *= 1.5
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    (tmp_path / "data" / "math").mkdir(parents=True)
    rows = [{"context": "w3 w4", "answer": "5"}, {"context": "w5", "answer": "6"}]
    (tmp_path / "data" / "math" / "svamp_test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "text.txt").write_text(" ".join(f"w{number % 40}" for number in range(200)))
    monkeypatch.setenv("PARED_DATA", str(tmp_path / "data"))
    return tmp_path


def evaluated(place: Path, model: str, *more: str) -> Any:
    text = ["--perplexity", f"file:{place}/text.txt", "--length", "16", "--windows", "6"]
    words = ["eval", str(place / model), *text, "--tasks", "svamp", "--json", str(place / f"{model}.json"), *more]
    return CliRunner().invoke(app, words)


def test_a_model_and_its_kept_results_compare_alike_and_nothing_is_left(place: Path) -> None:
    first = evaluated(place, "b")
    assert first.exit_code == 0, first.output
    by_file = evaluated(place, "a", "--against", str(place / "b.json"))
    told = json.loads((place / "a.json").read_text())
    by_name = evaluated(place, "a", "--against", str(place / "b"))
    again = json.loads((place / "a.json").read_text())
    assert by_file.exit_code == by_name.exit_code == 0, by_file.output + by_name.output
    assert told["differences"] == again["differences"]
    assert [one["metric"] for one in told["differences"]] == ["perplexity", "last_number", "math_verify"]
    assert told["perplexity"] == told["perplexity_on"]["perplexity"]
    assert "times, 95% from" in by_file.output
    assert not list(place.glob(".*"))


def test_a_killed_run_resumes_behind_the_perplexity(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(evaluating, "evaluate_task", killed)
        assert evaluated(place, "a").exit_code != 0
    with monkeypatch.context() as patch:
        patch.setattr(evaluating, "measure", killed)
        assert "--resume" in evaluated(place, "a").output
        resumed = evaluated(place, "a", "--resume")
    assert resumed.exit_code == 0, resumed.output
    assert json.loads((place / "a.json").read_text())["perplexity"] > 1
