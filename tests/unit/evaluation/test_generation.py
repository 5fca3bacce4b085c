"""Models write: batches as single prompts, compressed as dense, judged by answer or by running."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import TINY_MODELS
from torch import nn
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

import pared
from pared import ParedError
from pared.checkpoint import load
from pared.cli.commands import app
from pared.entrypoints.export import make_dense
from pared.evaluation import Sampling, complete, evaluate_task, task_of
from pared.evaluation.answers import boxed, last_number, marked_number, normalised, same_expression, same_number
from pared.evaluation.generation import cut_at
from pared.evaluation.pass_at_k import mean_pass_at_k, pass_at_k
from pared.evaluation.task import rows_of
from pared.modules import LowRankLinear, PivotedLinear, SparseLinear

PROMPTS = ["w3 w4 w5", "w6", "w7 w8 w9 w10 w11 w12", "w3 w4"]


# Text.


def test_prompts_together_say_what_each_says_alone(tokenizer: PreTrainedTokenizerFast) -> None:
    model = TINY_MODELS["llama"]()
    together = complete(model, tokenizer, PROMPTS, 8, batch=3)
    assert together == [complete(model, tokenizer, [prompt], 8)[0] for prompt in PROMPTS]
    assert any(text for (text,) in together)


KINDS: dict[str, tuple[type[nn.Module], dict[str, Any]]] = {
    "factors": (LowRankLinear, {"method": "svd-llm", "storage": "factors", "keep": 0.6}),
    "pivoted": (PivotedLinear, {"method": "svd-llm", "storage": "pivoted", "keep": 0.6}),
    "shared": (LowRankLinear, {"method": "basis-sharing", "options": {"sharing": "all"}, "keep": 0.7}),
    "sparse": (SparseLinear, {"method": "wanda", "sparsity": 0.5}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_compressed_model_writes_token_for_token_what_its_product_writes(
    kind: str, tokenizer: PreTrainedTokenizerFast, calibration: pared.Calibration, tmp_path: Path
) -> None:
    module, recipe = KINDS[kind]
    TINY_MODELS["llama"]().save_pretrained(tmp_path / "dense")
    tokenizer.save_pretrained(tmp_path / "dense")
    pared.run(pared.Recipe.model_validate({"calibration": calibration, "model": str(tmp_path / "dense"),
                                           "out": str(tmp_path / "out"), "evaluation": None, **recipe}))  # fmt: skip
    model, dense = load(tmp_path / "out"), make_dense(load(tmp_path / "out"))
    assert any(isinstance(own, module) for own in model.modules())
    assert any(getattr(own, "shares", None) for own in model.modules()) == (kind == "shared")
    assert not any(isinstance(own, module) for own in dense.modules())
    assert complete(model, tokenizer, PROMPTS, 24) == complete(dense, tokenizer, PROMPTS, 24)


def test_a_model_without_a_generation_config_is_named(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    model = TINY_MODELS["llama"]()
    model.save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").unlink()
    expected = complete(model, tokenizer, PROMPTS, 4)
    assert complete(load(tmp_path), tokenizer, PROMPTS, 4) == expected  # transformers makes one
    model.generation_config = None
    with pytest.raises(ParedError, match="LlamaForCausalLM has no generation config; give it one"):
        complete(model, tokenizer, PROMPTS, 4)
    with pytest.raises(ParedError, match="LlamaModel has no head for the next token"):
        complete(model.model, tokenizer, PROMPTS, 4)


def test_nothing_of_model_and_tokenizer_is_changed(tokenizer: PreTrainedTokenizerFast) -> None:
    model = TINY_MODELS["llama"]().train()
    before = (tokenizer.padding_side, tokenizer.pad_token)
    complete(model, tokenizer, PROMPTS, 2)
    assert (tokenizer.padding_side, tokenizer.pad_token) == before
    assert model.training


def test_an_answer_ends_before_the_first_stop_string(tokenizer: PreTrainedTokenizerFast) -> None:
    model = TINY_MODELS["llama"]()
    ((whole,),) = complete(model, tokenizer, PROMPTS[:1], 12)
    words = whole.split()
    stop = words[len(words) // 2]
    ((cut,),) = complete(model, tokenizer, PROMPTS[:1], 12, stop=[stop])
    assert cut == whole[: whole.index(stop)]
    assert cut_at("abc\ndef", ["\nd", "c"]) == "ab"


def test_samples_are_drawn_from_a_seed(tokenizer: PreTrainedTokenizerFast) -> None:
    model = TINY_MODELS["llama"]()
    drawn = Sampling(temperature=1.0, samples=4, seed=3)
    first, again = (complete(model, tokenizer, PROMPTS[:2], 10, sampling=drawn) for _ in range(2))
    assert first == again
    assert [len(texts) for texts in first] == [4, 4]
    assert len(set(first[0])) > 1


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"tokens": 127}, "more than the 128 positions of this model"),
        ({"tokens": 0}, "1 samples of 0 new tokens"),
        ({"sampling": Sampling(samples=3)}, "3 samples at temperature 0 would all be the same"),
        ({"sampling": Sampling(temperature=-1.0)}, "temperature -1 and top_p 1"),
    ],
)
def test_what_cannot_be_written_is_refused(
    tokenizer: PreTrainedTokenizerFast, more: dict[str, Any], message: str
) -> None:
    with pytest.raises(ParedError) as error:
        complete(TINY_MODELS["llama"](), tokenizer, ["w3 w4 w5"], **{"tokens": 4, **more})
    assert message in str(error.value)


# Answers.


@pytest.mark.parametrize(
    ("text", "number"),
    [("so 3 + 4 = 7 apples", "7"), ("it costs $1,234.50.", "1234.50"), ("x = -5", "-5"), ("none", None), ("18.", "18")],
)
def test_the_last_number_is_found(text: str, number: str | None) -> None:
    assert last_number(text) == number


def test_the_marked_number_is_gsm8ks() -> None:
    assert marked_number("first 3\n#### 1,018\nthen 5") == "1018"
    assert marked_number("no mark 5") is None
    assert same_number("18", "18.0")
    assert not same_number("18", None)
    assert not same_number("18", "19")


@pytest.mark.parametrize(
    ("text", "inside"),
    [
        (r"thus \boxed{\frac{1}{2}} is it", r"\frac{1}{2}"),
        (r"\boxed{1} and \boxed{2}", "2"),
        (r"$\boxed 7$", "7"),
        (r"\fbox{9}", "9"),
        (r"\boxed{never closed", None),
        ("none", None),
    ],
)
def test_the_box_is_found_with_its_braces(text: str, inside: str | None) -> None:
    assert boxed(text) == inside


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (r"\frac{1}{2}", "1/2"), (r"\dfrac12", r"\frac{1}{2}"), ("0.5", ".5"), (r"10\%", "10"), ("1,000", "1000"),
        (r"\left( 3, \frac{\pi}{2} \right)", r"(3,\frac{\pi}{2})"), (r"90^\circ", "90"), (r"\text{Evelyn}", "Evelyn"),
        ("x=5", "5"), (r"5\text{ cm}", "5"), (r"\sqrt2", r"\sqrt{2}"), ("2.0", "2"), (r"-\frac{3}{4}", "-0.75"),
    ],
)  # fmt: skip
def test_answers_written_differently_are_the_same(one: str, other: str) -> None:
    assert same_expression(one, other), (normalised(one), normalised(other))


@pytest.mark.parametrize(
    ("one", "other"), [("1", "2"), (r"\frac{1}{2}", r"\frac{1}{3}"), ("(1,2)", "(2,1)"), ("a", None)]
)
def test_other_answers_are_not(one: str, other: str | None) -> None:
    assert not same_expression(one, other)


def test_every_answer_of_math500_is_found_in_its_own_solution(monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    if not os.environ.get("PARED_DATA"):
        pytest.skip("the data are not at hand: PARED_DATA is not set")
    rows = rows_of(task_of("math500"))
    right = sum(same_expression(boxed(row["solution"]), row["answer"]) for row in rows)
    assert right >= 0.99 * len(rows)


# pass@k.


def test_pass_at_k_is_the_share_of_choices_with_a_right_one() -> None:
    from itertools import combinations

    for n in range(1, 7):
        for c in range(n + 1):
            for k in range(1, n + 1):
                sets = list(combinations(range(n), k))
                exact = sum(any(one < c for one in chosen) for chosen in sets) / len(sets)
                assert pass_at_k(n, c, k) == pytest.approx(exact)
    assert mean_pass_at_k([(2, 1), (2, 0)], 1) == 0.25
    with pytest.raises(ValueError, match="expected 1 to 2 tries"):
        pass_at_k(2, 1, 3)


# Tasks.


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, list[dict[str, Any]]], Path]:
    monkeypatch.setenv("PARED_DATA", str(tmp_path))

    def put(file: str, rows: list[dict[str, Any]]) -> Path:
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_text("\n".join(map(json.dumps, rows)) + "\n")
        return tmp_path / file

    return put


class Writer:
    """Stands for a model whose answers are known."""

    def __init__(self, answers: list[list[str]]) -> None:
        self.answers, self.prompts = answers, []

    def __call__(self, *given: Any, **_: Any) -> list[list[str]]:
        self.prompts = given[2]
        return self.answers


def test_gsm8k_is_judged_by_mark_and_by_last_number(data: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"question": f"q{index}", "answer": f"so\n#### {index}"} for index in range(4)]
    data("math/gsm8k_test.jsonl", rows)
    monkeypatch.setattr(
        "pared.evaluation.generation.complete", Writer([["#### 0"], ["it is 1"], ["#### 3 or 2"], ["no"]])
    )
    result = evaluate_task(None, None, "gsm8k", shots=0)
    assert (result.metrics["exact_match"], result.metrics["last_number"]) == (0.25, 0.75)
    assert result.errors["exact_match"] == pytest.approx((0.25 * 0.75 / 3) ** 0.5)


@pytest.mark.parametrize(
    ("task", "row", "message"),
    [
        ("gsm8k", {"question": "q", "answer": 3}, r"row 1: expected answer to be str, got 3"),
        ("gsm8k", {"question": "q", "answer": "three"}, r"row 1: answer 'three' says no number to judge by"),
        ("svamp", {"context": "q", "answer": "three"}, r"row 1: answer 'three' says no number to judge by"),
        (
            "mbpp",
            {"text": "t", "code": "c", "task_id": "11", "test_list": []},
            r"expected task_id to be int, got '11'",
        ),
        ("mbpp", {"text": "t", "code": "c", "task_id": 11, "test_list": None}, r"expected test_list to be list, got"),
    ],
)
def test_a_row_that_cannot_be_judged_is_named(data: Any, task: str, row: dict[str, Any], message: str) -> None:
    data(task_of(task).data.file, [row])
    with pytest.raises(ParedError, match=message):
        rows_of(task_of(task))


def test_shots_stand_before_the_prompt_as_they_are_solved(data: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import gzip

    shown = [{"question": f"t{index}", "answer": f"so\n#### {index}"} for index in range(3)]
    data("math/gsm8k_test.jsonl", [{"question": "q", "answer": "#### 1"}])
    path = data("math/gsm8k_train.jsonl.gz", [])
    path.write_bytes(gzip.compress("\n".join(map(json.dumps, shown)).encode()))
    writer = Writer([["#### 1"]])
    monkeypatch.setattr("pared.evaluation.generation.complete", writer)
    evaluate_task(None, None, "gsm8k", shots=2)
    assert writer.prompts == [
        "Question: t0\nAnswer: so\n#### 0\n\nQuestion: t1\nAnswer: so\n#### 1\n\nQuestion: q\nAnswer:"
    ]
    with pytest.raises(ParedError, match="has 3 examples to show, got a request for 4"):
        evaluate_task(None, None, "gsm8k", shots=4)


HUMANEVAL = {
    "prompt": "def double(x):\n",
    "entry_point": "double",
    "test": "def check(candidate):\n    assert candidate(2) == 4\n",
    "canonical_solution": "    return 2 * x\n",
}


def test_code_is_judged_by_running_it(data: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    data("code/HumanEval.jsonl", [HUMANEVAL, HUMANEVAL])
    answers = [["    return 2 * x", "    return x"], ["    return x + x", "    while True: pass"]]
    monkeypatch.setattr("pared.evaluation.generation.complete", Writer(answers))
    from pared.evaluation.sandbox import Limits

    sampling = Sampling(temperature=0.8, samples=2)
    result = evaluate_task(
        None, None, "humaneval", sampling=sampling, run_code=True, ks=(1, 2), limits=Limits(seconds=1)
    )
    assert result.metrics == {"pass@1": 0.5, "pass@2": 1.0}
    assert result.answers[1]["verdicts"][1]["why"] in ("computed for longer than it may", "ran for more than 5 seconds")


def test_every_task_is_solved_by_its_own_solutions(monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    if not os.environ.get("PARED_DATA"):
        pytest.skip("the data are not at hand: PARED_DATA is not set")
    for name, metric in (
        ("humaneval", "pass@1"),
        ("mbpp", "pass@1"),
        ("gsm8k", "exact_match"),
        ("svamp", "last_number"),
    ):
        task = task_of(name)
        answers = [[task.answer(row).removesuffix("[DONE]")] for row in rows_of(task, 12)]
        monkeypatch.setattr("pared.evaluation.generation.complete", Writer(answers))
        result = evaluate_task(None, None, name, limit=12, shots=0, run_code=True)
        assert result.metrics[metric] == result.metrics.get("math_verify", 1.0) == 1.0, (name, result.answers)


def test_a_model_does_a_task_from_the_command_line(
    data: Any, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    model = TINY_MODELS["llama"]()
    model.config.max_position_embeddings = 512
    model.save_pretrained(tmp_path / "m")
    tokenizer.save_pretrained(tmp_path / "m")
    data("math/svamp_test.jsonl", [{"context": "w3 w4", "answer": "5"}, {"context": "w5", "answer": "6"}])
    arguments = ["eval", str(tmp_path / "m"), "--tasks", "svamp", "--json", str(tmp_path / "out.json")]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert "svamp: last_number 0.0000 ± 0.0000, math_verify 0.0000 ± 0.0000; 2 rows, 0 shots" in result.output
    (told,) = json.loads((tmp_path / "out.json").read_text())["tasks"]
    assert len(told["answers"]) == 2


@pytest.mark.parametrize(
    ("name", "rows", "more", "message"),
    [
        ("gsm9k", None, {}, "unknown task 'gsm9k'; did you mean 'gsm8k'"),
        ("svamp", None, {}, "which has no math/svamp_test.jsonl; that folder holds "),
        ("svamp", [], {}, "has no rows to evaluate on"),
        (
            "svamp",
            [{"context": "c", "answer": "1"}, {"context": "c"}],
            {},
            "row 2: expected context, answer; answer is",
        ),
        ("svamp", [{"context": "c", "answer": "1"}], {"limit": 0}, "a limit of 0 rows leaves nothing"),
        ("svamp", [{"context": "c", "answer": "1"}], {"shots": 2}, "has no examples to show apart from"),
        ("humaneval", [HUMANEVAL], {}, "allow it with allow_code_execution=True"),
        (
            "humaneval",
            [HUMANEVAL],
            {"run_code": True, "ks": (1, 5)},
            "pass@5 needs 5 samples of every problem, got 1",
        ),
    ],
)
def test_bad_tasks_and_data_are_refused_by_name(
    data: Any, name: str, rows: list[dict[str, Any]] | None, more: dict[str, Any], message: str
) -> None:
    if rows is not None:
        data(task_of(name).data.file, rows)
    with pytest.raises(ParedError) as error:
        evaluate_task(None, None, name, **more)
    assert message in str(error.value)
    assert torch.is_grad_enabled()
