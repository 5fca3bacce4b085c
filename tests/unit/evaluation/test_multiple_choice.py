"""Tasks in which a model chooses: their prompts and metrics are the harness's, their rows are read from files."""

import gzip
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lm_eval.tasks
import pytest
import torch
from datasets import Dataset
from lm_eval.api.task import ConfigurableTask
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks._yaml_loader import load_yaml
from tiny_models import TINY_MODELS
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

import pared
from pared.cli.commands import app
from pared.entrypoints.evaluation import evaluating as entry
from pared.evaluation.batch_size import BatchSize
from pared.evaluation.multiple_choice import CHOICES, evaluate_choices, prepare
from pared.progress import Silent

HARNESS = Path(lm_eval.tasks.__file__).parent
ASKED = "w1 w2 w3"

# For every task: where the harness defines it, a row as its data set has it, and the same as our file has it.
SAME: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "arc_easy": (
        "arc/arc_easy.yaml",
        {"question": ASKED, "choices": {"text": ["w4", "w5 w6"], "label": ["A", "B"]}, "answerKey": "B"},
        {"question": ASKED, "choices": ["w4", "w5 w6"], "gold": 1},
    ),
    "arc_challenge": (
        "arc/arc_challenge.yaml",
        {"question": ASKED, "choices": {"text": ["w4", "w5", "w7"], "label": ["1", "2", "3"]}, "answerKey": "3"},
        {"question": ASKED, "choices": ["w4", "w5", "w7"], "gold": 2},
    ),
    "mathqa": (
        "mathqa/mathqa.yaml",
        {"Problem": ASKED, "options": "a ) w4 , b ) w5 , c ) w6 , d ) w7 , e ) w8", "correct": "d"},
        {"question": ASKED, "choices": ["w4", "w5", "w6", "w7", "w8"], "gold": 3},
    ),
    "openbookqa": (
        "openbookqa/openbookqa.yaml",
        {"question_stem": ASKED, "choices": {"text": ["w4", "w5"], "label": ["A", "B"]}, "answerKey": "A"},
        {"query": ASKED, "choices": ["w4", "w5"], "gold": 0},
    ),
    "hellaswag": (
        "hellaswag/hellaswag.yaml",
        {"activity_label": "w9", "ctx_a": "w1 w2.", "ctx_b": "w3", "endings": ["w4 [step] w5", "w6 [title] w7"],
         "label": "1"},
        {"query": "w9: w1 w2. W3", "choices": ["w4 w5", "w6. w7"], "gold": 1},
    ),
    "piqa": (
        "piqa/piqa.yaml",
        {"goal": ASKED, "sol1": "w4 w5", "sol2": "w6", "label": 1},
        {"query": f"Question: {ASKED}\n", "choices": ["w4 w5", "w6"], "gold": 1},
    ),
    "boolq": (
        "super_glue/boolq/default.yaml",
        {"passage": "w8 w9 w10.", "question": ASKED, "label": 1},
        {"query": f"Passage: w8 w9 w10.\nQuestion: {ASKED}?", "choices": ["no", "yes"], "gold": 1},
    ),
    "rte": (
        "glue/rte/default.yaml",
        {"sentence1": "w1 w2.", "sentence2": "w3 w4.", "label": 1},
        {"index": "0", "sentence1": "w1 w2.", "sentence2": "w3 w4.", "label": "not_entailment"},
    ),
    "winogrande": (
        "winogrande/default.yaml",
        {"sentence": "w1 w2 so _ w3 w4.", "option1": "w5", "option2": "w6", "answer": "2"},
        {"context_options": ["w1 w2 so w5", "w1 w2 so w6"], "continuation": "w3 w4.", "gold": 1},
    ),
    "lambada_openai": (
        "lambada/lambada_openai.yaml",
        {"text": "w1 w2. w3 w4"},
        {"context": "w1 w2. w3", "continuation": "w4"},
    ),
    "mmlu": (
        "mmlu/default/mmlu_high_school_us_history.yaml",
        {"question": f"{ASKED} ", "choices": ["w4", "w5", "w6", "w7"], "answer": 2},
        {"question": f"{ASKED} ", "choices": ["w4", "w5", "w6", "w7"], "gold": 2, "subject": "high_school_us_history"},
    ),
}  # fmt: skip
SUBJECTS = sorted(path.stem for path in (HARNESS / "mmlu" / "default").glob("mmlu_*.yaml"))


def harness_task(where: str, *rows: dict[str, Any]) -> ConfigurableTask:
    """The harness's own task over rows as its data set has them."""
    config = load_yaml(HARNESS / where, resolve_func=True)
    splits = {name: config.get(f"{name}_split") for name in ("training", "validation", "test", "fewshot")}
    made = {split: Dataset.from_list(list(rows)) for split in splits.values() if split}
    return ConfigurableTask(config={**config, "custom_dataset": lambda **_: made})


def write(folder: Path, name: str, *rows: dict[str, Any]) -> None:
    """Write rows where the definition of a task reads them."""
    definition = (Path(pared.evaluation.multiple_choice.__file__).parent / "definitions" / f"{name}.yaml").read_text()
    files = [line.split()[-1] for line in definition.splitlines() if line.strip().startswith(("file:", "shown:"))]
    for file in files:
        path = folder / file
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".tsv":
            text = "\n".join("\t".join(cells) for cells in [rows[0].keys(), *(row.values() for row in rows)])
        else:
            text = "\n".join(json.dumps(row) for row in rows)
        path.with_suffix("" if path.suffix == ".gz" else path.suffix).write_text(f"{text}\n", encoding="utf-8")
        if path.suffix == ".gz":
            path.write_bytes(gzip.compress(path.with_suffix("").read_bytes()))


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of data with one row of every task, two of most."""
    monkeypatch.setenv("PARED_DATA", str(tmp_path))
    for name, (_, _, row) in SAME.items():
        rows = [{**row, "subject": subject.removeprefix("mmlu_")} for subject in SUBJECTS] if name == "mmlu" else [row]
        write(tmp_path, name, *rows)
    return tmp_path


def ours(name: str) -> ConfigurableTask:
    """Our task of a name; of MMLU the subject in the table."""
    tasks = prepare([name]).loaded["tasks"]
    return tasks[name] if name != "mmlu" else tasks["mmlu::mmlu_high_school_us_history"]


def test_every_definition_is_compared() -> None:
    assert set(SAME) == set(CHOICES)


@pytest.mark.parametrize("name", CHOICES)
def test_prompts_answers_and_metrics_are_those_of_the_installed_harness(name: str, data: Path) -> None:
    where, row, _ = SAME[name]
    theirs, own = harness_task(where, row), ours(name)
    doc = next(iter(theirs.test_docs() if theirs.has_test_docs() else theirs.validation_docs()))
    mine = next(iter(own.test_docs()))
    assert own.doc_to_text(mine) == theirs.doc_to_text(doc)
    assert own.doc_to_target(mine) == theirs.doc_to_target(doc)
    if own.config.doc_to_choice is not None:
        assert own.doc_to_choice(mine) == theirs.doc_to_choice(doc)
    assert own.fewshot_context(mine, 0) == theirs.fewshot_context(doc, 0)
    context = own.fewshot_context(mine, 0)
    asked = [task.construct_requests(one, context, doc_id=0, metadata=(None, 0, 1)) for task, one in
             ((own, mine), (theirs, doc))]  # fmt: skip
    asked = [requests if isinstance(requests, list) else [requests] for requests in asked]
    assert [request.arguments for request in asked[0]] == [request.arguments for request in asked[1]]
    assert own.config.output_type == theirs.config.output_type
    assert list(own._metric_fn_list) == list(theirs._metric_fn_list)
    assert own.aggregation() == theirs.aggregation()
    assert own.higher_is_better() == theirs.higher_is_better()
    if name == "mmlu":  # a group, which has a version of its own
        group = load_yaml(HARNESS / "mmlu" / "default" / "_mmlu.yaml")
        assert prepare(["mmlu"]).loaded["groups"]["mmlu"].version == str(group["metadata"]["version"])
    else:
        assert own.config.metadata["version"] == theirs.config.metadata["version"]


def test_every_subject_of_mmlu_is_described_as_the_harness_describes_it(data: Path) -> None:
    tasks = prepare(["mmlu"]).loaded["tasks"]
    assert sorted(tasks) == sorted(f"mmlu::{subject}" for subject in SUBJECTS)
    for subject in SUBJECTS:
        own = tasks[f"mmlu::{subject}"]
        theirs = harness_task(f"mmlu/default/{subject}.yaml", {**SAME["mmlu"][1]})
        mine, doc = own.test_docs()[0], theirs.test_docs()[0]
        assert mine["subject"] == subject.removeprefix("mmlu_")
        assert own.fewshot_context(mine, 0) == theirs.fewshot_context(doc, 0)


def test_examples_of_mmlu_are_the_first_of_the_subject(data: Path) -> None:
    name = "high_school_us_history"
    rows = [{**SAME["mmlu"][2], "question": f"w{i}", "gold": i % 4, "subject": name} for i in range(20, 26)]
    others = [
        {**SAME["mmlu"][2], "subject": subject.removeprefix("mmlu_")} for subject in SUBJECTS if name not in subject
    ]
    many = [row for row in others for _ in range(5)]
    (data / "mc" / "mmlu_dev_5shot.jsonl").write_text("\n".join(map(json.dumps, [*rows, *many])), encoding="utf-8")
    task = prepare(["mmlu"], shots=2).loaded["tasks"][f"mmlu::mmlu_{name}"]
    theirs = harness_task(SAME["mmlu"][0], *[{**row, "answer": row["gold"]} for row in rows])
    assert task.fewshot_context(task.test_docs()[0], 2) == theirs.fewshot_context({**SAME["mmlu"][2], "answer": 2}, 2)
    assert "w20" in task.fewshot_context(task.test_docs()[0], 2)
    with pytest.raises(pared.ParedError, match=r"mmlu_.* has [56] examples to show, got a request for 9"):
        prepare(["mmlu"], shots=9)


def many(count: int, **row: Callable[[int], Any]) -> list[dict[str, Any]]:
    """Rows of which each field is made from its number."""
    return [{name: make(i) for name, make in row.items()} for i in range(count)]


def test_a_model_scores_as_with_the_plain_harness(data: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    ask = {"question": lambda i: f"w{i % 50} w{(3 * i) % 60} w{i % 7}"}
    texts = {"text": lambda i: [f"w{i % 9}", f"w{i % 11} w{i % 13}", f"w{i % 5} w8 w{i % 3}"]}
    rows = many(30, **ask, choices=texts["text"], gold=lambda i: (i * i) % 3)
    write(data, "arc_easy", *rows)
    words = many(20, context=lambda i: f"w{i} w{i + 1} w{i + 2}", continuation=lambda i: f"w{(7 * i) % 60}")
    write(data, "lambada_openai", *words)
    model = TINY_MODELS["llama"]()
    found = evaluate_choices(
        model, tokenizer, prepare(["arc_easy", "lambada_openai"], limit=25), Silent().stage, batch=4
    )
    theirs = {
        "arc_easy": harness_task("arc/arc_easy.yaml", *[
            {"question": row["question"], "choices": {"text": row["choices"], "label": ["A", "B", "C"]},
             "answerKey": "ABC"[row["gold"]]} for row in rows]),
        "lambada_openai": harness_task("lambada/lambada_openai.yaml", *[
            {"text": f"{row['context']} {row['continuation']}"} for row in words]),
    }  # fmt: skip
    scorer = HFLM(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=1)
    plain = evaluate(scorer, {"tasks": theirs, "groups": {}, "group_map": {}}, limit=25, bootstrap_iters=0)["results"]
    for result in found:
        for metric, value in result.metrics.items():
            assert value == pytest.approx(plain[result.task][f"{metric},none"], rel=1e-5)
        assert result.rows == min(25, len(rows if result.task == "arc_easy" else words)) == len(result.answers)
    assert {result.task: list(result.metrics) for result in found} == {
        "arc_easy": ["acc", "acc_norm"],
        "lambada_openai": ["perplexity", "acc"],
    }
    right = [row["verdicts"]["acc"] for row in found[0].answers]
    assert found[0].metrics["acc"] == pytest.approx(sum(right) / len(right))
    assert all(len(row["log_likelihoods"]) == 3 for row in found[0].answers)
    assert 0 < found[0].errors["acc"] < 0.2


def test_a_group_counts_every_question_once(data: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    subjects = [subject.removeprefix("mmlu_") for subject in SUBJECTS]
    asked = [*[(subject, 0) for subject in subjects], *[(subjects[0], gold) for gold in (1, 2, 3) for _ in range(9)]]
    rows = [{**SAME["mmlu"][2], "subject": subject, "gold": gold} for subject, gold in asked]
    write(data, "mmlu", *rows)
    (found,) = evaluate_choices(TINY_MODELS["llama"](), tokenizer, prepare(["mmlu"]), Silent().stage)
    assert found.rows == len(rows)
    assert [part["task"] for part in found.answers] == sorted(SUBJECTS)
    by_subject = {part["task"]: part["metrics"]["acc"] for part in found.answers}
    own = by_subject.pop(f"mmlu_{subjects[0]}")
    right = own * 28 + sum(by_subject.values())
    assert 0 < own < 1 or right > 0
    assert found.metrics["acc"] == pytest.approx(right / len(rows))
    assert found.metrics["acc"] != pytest.approx((own + sum(by_subject.values())) / len(subjects))


def test_progress_counts_every_sequence_the_model_sees(data: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    seen: dict[str, int] = {}

    @contextmanager
    def stage(name: str, total: int, unit: str) -> Iterator[Callable[[], None]]:
        seen.update(total=total, done=0)
        yield lambda: seen.update(done=seen["done"] + 1)

    evaluate_choices(TINY_MODELS["llama"](), tokenizer, prepare(["arc_easy", "mmlu", "winogrande"]), stage)
    assert seen["total"] == seen["done"] > 0


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"question": "w1", "choices": ["w2", "w3"], "gold": 2}, "row 2: gold is 2, expected 0 to 1, one of its 2"),
        ({"question": "w1", "choices": ["w2", "w3"], "gold": "1"}, "row 2: gold is '1', expected 0 to 1"),
        ({"question": "w1", "choices": ["w2", "w3"], "gold": -1}, "row 2: gold is -1, expected 0 to 1"),
        ({"question": "w1", "choices": ["w2", "w3"]}, "row 2: gold is missing; got choices, question"),
        ({"question": "w1", "choices": ["w2"], "gold": 0}, "row 2: choices is .*expected a list of two texts or more"),
        ({"question": "w1", "choices": ["w2", 3], "gold": 0}, "row 2: choices is .*expected a list of two texts"),
        ({"question": " ", "choices": ["w2", "w3"], "gold": 0}, "row 2: question is ' ', expected a text"),
        ([1], "row 2: expected question, choices, gold, got list"),
    ],
)
def test_a_row_that_is_none_is_named(row: Any, said: str, data: Path) -> None:
    path = data / "mc" / "arc_easy_test.jsonl"
    path.write_text(f"{json.dumps(SAME['arc_easy'][2])}\n{json.dumps(row)}\n", encoding="utf-8")
    with pytest.raises(pared.ParedError, match=f"{path}, {said}"):
        prepare(["arc_easy"])


@pytest.mark.parametrize(
    ("name", "fields", "said"),
    [
        ("rte", {"label": "maybe"}, "label is 'maybe', expected one of entailment, not_entailment"),
        (
            "boolq",
            {"choices": ["yes", "no"]},
            "choices is .* expected the choices no, yes, in this order",
        ),
        ("mmlu", {"choices": ["w1", "w2", "w3"], "gold": 0}, "expected a list of 4 texts"),
        ("mmlu", {"choices": ["w1", "w2", "w3", "w4", "w5"], "gold": 4}, "expected a list of 4 texts"),
        ("piqa", {"choices": ["w1", "w2", "w3"], "gold": 2}, r"choices is .* expected a list of 2 texts"),
    ],
)
def test_a_row_that_would_be_scored_wrongly_is_named(name: str, fields: dict[str, Any], said: str, data: Path) -> None:
    write(data, name, {**SAME[name][2], **fields})
    with pytest.raises(pared.ParedError, match=f"row [12]: {said}" if name != "mmlu" else said):
        prepare([name])


def test_questions_that_are_too_long_are_cut_and_that_is_told(data: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    long = {"question": "w3 " * 300, "choices": ["w4", "w5"], "gold": 0}
    write(data, "arc_easy", SAME["arc_easy"][2], long)
    told: list[str] = []
    evaluate_choices(TINY_MODELS["llama"](), tokenizer, prepare(["arc_easy"]), Silent().stage, note=told.append)
    assert told == ["1 questions with their examples are longer than the 128 tokens this model takes; their beginnings "
                    "were cut off"]  # fmt: skip


def test_data_that_are_not_there_are_named(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = data / "mc" / "piqa_valid.jsonl"
    path.write_text("", encoding="utf-8")
    with pytest.raises(pared.ParedError, match=r"piqa_valid\.jsonl has no rows"):
        prepare(["piqa"])
    path.unlink()
    with pytest.raises(pared.ParedError, match=r"which has no mc/piqa_valid\.jsonl; that folder holds arc_"):
        prepare(["piqa"])
    table = data / "glue" / "RTE" / "dev.tsv"
    table.write_text("index\tsentence1\tsentence2\tlabel\n0\tw1\tw2\n", encoding="utf-8")
    with pytest.raises(pared.ParedError, match=r"dev\.tsv, row 2: expected 4 columns, got 3"):
        prepare(["rte"])
    monkeypatch.delenv("PARED_DATA")
    with pytest.raises(
        pared.ParedError, match=r"the data of openbookqa on the Hub: cannot be read \(.*\); if this machine"
    ):
        prepare(["openbookqa"])


def test_examples_never_come_from_what_is_measured(data: Path) -> None:
    with pytest.raises(pared.ParedError, match="task arc_easy has no examples to show apart from"):
        prepare(["arc_easy"], shots=1)
    with pytest.raises(pared.ParedError, match="a limit of 0 rows leaves nothing"):
        prepare(["arc_easy"], limit=0)
    with pytest.raises(pared.ParedError, match="cannot show -1 examples"):
        prepare(["mmlu"], shots=-1)


def test_the_command_does_chosen_and_written_tasks_in_one_run(
    data: Path, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    folder, out = tmp_path / "model", tmp_path / "found.json"
    model = TINY_MODELS["llama"]()
    model.config.max_position_embeddings = 512
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (data / "math").mkdir()
    (data / "math" / "svamp_test.jsonl").write_text(json.dumps({"context": "w1", "answer": "3"}), encoding="utf-8")
    ran = CliRunner().invoke(app, ["eval", str(folder), "--tasks", "rte,svamp,piqa", "--json", str(out)])
    assert ran.exit_code == 0, ran.output
    found = json.loads(out.read_text())["tasks"]
    assert [task["task"] for task in found] == ["rte", "piqa", "svamp"]
    assert "piqa: acc " in ran.output
    assert "bootstrapping" not in ran.output
    wrong = CliRunner().invoke(app, ["eval", str(folder), "--tasks", "arc_esy"])
    assert wrong.exit_code == 2
    assert "did you mean 'arc_easy'?" in wrong.output
    assert os.environ.get("DISABLE_MULTIPROC") is None
    assert not list(tmp_path.glob(".found.json*"))


def test_a_killed_run_goes_on_after_the_tasks_it_has_done(
    data: Path, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, out = tmp_path / "model", tmp_path / "found.json"
    model = TINY_MODELS["llama"]()
    model.config.max_position_embeddings = 512
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    command = ["eval", str(folder), "--tasks", "rte,piqa", "--json"]
    assert CliRunner().invoke(app, [*command, str(tmp_path / "whole.json")]).exit_code == 0
    done: list[str] = []
    score = entry.evaluate_choices

    def killed_at_the_second(*arguments: Any, **more: Any) -> Any:
        done.append("")
        if len(done) == 2:
            raise KeyboardInterrupt
        return score(*arguments, **more)

    monkeypatch.setattr(entry, "evaluate_choices", killed_at_the_second)
    assert CliRunner().invoke(app, [*command, str(out)]).exit_code != 0
    assert not out.exists()
    other = CliRunner().invoke(app, [*command, str(out), "--limit", "1"])
    assert "(limit: None there, 1 now)" in " ".join(other.output.split())
    again = CliRunner().invoke(app, [*command, str(out), "--resume"])
    assert again.exit_code == 0, again.output
    assert "resuming after rte" in again.output
    assert len(done) == 3  # rte, piqa that was killed, piqa
    assert json.loads(out.read_text()) == json.loads((tmp_path / "whole.json").read_text())
    assert not list(tmp_path.glob(".found.json*"))


def test_likelihoods_do_not_depend_on_the_batch_and_one_that_does_not_fit_is_halved(
    data: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    row = SAME["arc_easy"][2]
    write(data, "arc_easy", *({**row, "question": f"w{number} " * number} for number in range(3, 9)))
    model, tasks, sizes = TINY_MODELS["llama"](), prepare(["arc_easy"]), list[int]()

    def lacking(module: Any, given: Any, named: Any) -> None:
        sizes.append(len(given[0] if given else named["input_ids"]))
        if sizes[-1] > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")

    def likelihoods(batch: Any) -> list[float]:
        (found,) = evaluate_choices(model, tokenizer, tasks, Silent().stage, batch)
        return [nats for answer in found.answers for nats in answer["log_likelihoods"]]

    alone = likelihoods(1)
    assert likelihoods(5) == pytest.approx(alone, abs=1e-4)
    handle = model.register_forward_pre_hook(lacking, with_kwargs=True)
    size = BatchSize("auto")
    assert likelihoods(size) == pytest.approx(alone, abs=1e-4)
    handle.remove()
    assert size.now == 2
    assert sizes[-1] <= 2
