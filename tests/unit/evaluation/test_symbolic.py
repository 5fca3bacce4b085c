"""Answers that are equal as mathematics, judged by math-verify beside the comparison of notations."""

import json
import logging
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pared.entrypoints.evaluation.against import differences
from pared.evaluation import evaluate_task, symbolic
from pared.evaluation.symbolic import Verifier
from pared.evaluation.task import rows_of
from pared.evaluation.tasks import task_of

Put = Callable[..., None]


@pytest.fixture(scope="module")
def verifier() -> Iterator[Verifier]:
    with Verifier() as found:
        yield found


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Put:
    """Puts rows into a file of PARED_DATA, and the answers that a model is to write to them."""
    monkeypatch.setenv("PARED_DATA", str(tmp_path))

    def put(file: str, rows: list[dict[str, Any]], answers: list[str]) -> None:
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_text("\n".join(map(json.dumps, rows)) + "\n")
        monkeypatch.setattr("pared.evaluation.generation.complete", lambda *_: [[answer] for answer in answers])

    return put


@pytest.mark.parametrize(
    ("right", "answer", "same"),
    [
        (r"\boxed{x+1}", r"so \boxed{1+x}.", True),
        (r"\boxed{\frac{1}{2}}", r"\boxed{0.5}", True),
        (r"\boxed{2\sqrt{2}}", r"hence \boxed{\sqrt{8}}", True),
        (r"\boxed{x+1}", r"\boxed{x+2}", False),
        (r"\boxed{[1,2)}", r"\boxed{(1,2)}", False),
        (r"\boxed{3}", "I do not know", False),
        ("18", "She makes 9 * 2 = $18.00 every day.", True),
        ("18", "#### 18", True),
        ("18", "", False),
    ],
)
def test_answers_are_equal_if_they_are_as_mathematics(verifier: Verifier, right: str, answer: str, same: bool) -> None:
    assert verifier.same(right, answer) is same


def test_a_process_that_does_not_answer_is_ended_and_another_takes_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    start = subprocess.Popen
    stuck = ["import time; time.sleep(60)", "import sys; sys.exit(1)"]

    def begin(command: list[str], **how: Any) -> subprocess.Popen[bytes]:
        return start([command[0], "-c", stuck.pop(0)] if stuck else command, **how)

    monkeypatch.setattr(subprocess, "Popen", begin)
    began = time.monotonic()
    with Verifier(patience=0.5) as found:
        assert not found.same("1", "1")  # it sleeps
        assert time.monotonic() - began < 30
        found._patience = symbolic.PATIENCE
        assert not found.same("1", "1")  # it is gone at once
        assert found.same("1", "1")
        process = found._process
    assert process is not None
    assert process.poll() is not None


PROBLEMS = [
    {"problem": "a", "solution": "s", "answer": "x+1", "subject": "Algebra", "level": 1},
    {"problem": "b", "solution": "s", "answer": "2", "subject": "Counting & Probability", "level": 5},
    {"problem": "c", "solution": "s", "answer": "3", "subject": "Algebra", "level": 5},
]


def test_math_has_both_scores_by_subject_and_by_level(write: Put) -> None:
    write("math/math500.jsonl", PROBLEMS, [r"\boxed{1+x}", r"\boxed{2}", r"\boxed{4}"])
    result = evaluate_task(None, None, "math500")  # type: ignore[arg-type]
    assert result.metrics == {"equivalent": pytest.approx(1 / 3), "math_verify": pytest.approx(2 / 3)}
    assert [row["verdicts"][0]["math_verify"] for row in result.answers] == [True, True, False]
    assert {kind: list(names) for kind, names in result.groups.items()} == {
        "subject": ["algebra", "counting_and_probability"], "level": ["1", "5"]
    }  # fmt: skip
    algebra = result.groups["subject"]["algebra"]
    assert algebra["rows"] == 2
    assert algebra["metrics"] == {"equivalent": 0.0, "math_verify": 0.5}
    for kind in result.groups:  # the mean over all is that of the groups, by their rows
        sums = sum(one["rows"] * one["metrics"]["math_verify"] for one in result.groups[kind].values())
        assert sums / result.rows == pytest.approx(result.metrics["math_verify"])


def test_what_says_no_subject_or_level_is_in_no_group(write: Put) -> None:
    write("math/math500.jsonl", [{**PROBLEMS[1], "subject": None, "level": None}], [r"\boxed{2}"])
    assert evaluate_task(None, None, "math500").groups == {}  # type: ignore[arg-type]


def test_gsm8k_has_all_three_scores(write: Put) -> None:
    rows = [{"question": "q", "answer": f"so\n#### {number}"} for number in (1, 2, 3)]
    write("math/gsm8k_test.jsonl", rows, ["#### 1", "it is $2.00", "none"])
    metrics = evaluate_task(None, None, "gsm8k", shots=0).metrics  # type: ignore[arg-type]
    assert metrics == {
        "exact_match": pytest.approx(1 / 3), "last_number": pytest.approx(2 / 3), "math_verify": pytest.approx(2 / 3)
    }  # fmt: skip


def test_without_the_package_there_is_the_other_score_and_that_is_said(
    write: Put, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(symbolic, "PACKAGE", "no_such_package")
    write("math/math500.jsonl", PROBLEMS, [r"\boxed{1+x}", r"\boxed{2}", r"\boxed{4}"])
    with caplog.at_level(logging.WARNING):
        without = evaluate_task(None, None, "math500")  # type: ignore[arg-type]
    assert list(without.metrics) == ["equivalent"]
    assert "no math_verify, as its package is not installed: pip install math-verify" in caplog.text
    monkeypatch.undo()


def test_results_with_and_without_the_score_are_compared_by_what_both_have() -> None:
    def results(*metrics: str) -> dict[str, Any]:
        verdicts = [{"verdicts": [dict.fromkeys(metrics, right)]} for right in (True, False)]
        task = {"task": "math500", "metrics": dict.fromkeys(metrics, 0.5), "answers": verdicts}
        return {"model": "m", "limit": None, "shots": None, "data": "d", "tasks": [task]}

    both = differences(results("equivalent", "math_verify"), results("equivalent"))
    assert [one["metric"] for one in both] == ["equivalent"]


@pytest.mark.slow
def test_every_answer_of_math500_is_verified_in_its_own_solution(verifier: Verifier) -> None:
    if not os.environ.get("PARED_DATA"):
        pytest.skip("the data are not at hand: PARED_DATA is not set")
    task = task_of("math500")
    assert task.symbolic is not None
    assert all(verifier.same(task.symbolic(row), row["solution"]) for row in rows_of(task))
