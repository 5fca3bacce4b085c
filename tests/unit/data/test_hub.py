"""Rows of the Hub, where PARED_DATA names no folder, are those of the files; the Hub itself is a table here."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
from datasets import Dataset, DatasetDict
from tiny_models import TINY_MODELS
from transformers import PreTrainedTokenizerFast

from pared import ParedError
from pared.data import find_examples
from pared.data.corpora import CORPORA
from pared.data.files import data_file
from pared.data.instructions import SETS, find_instructions
from pared.data.texts import find_text
from pared.evaluation.multiple_choice import CHOICES, evaluate_choices, prepare, scoring
from pared.evaluation.task import examples_of, rows_of
from pared.evaluation.tasks import MATH_SUBJECTS, TASKS, task_of
from pared.progress import Silent
from unit.evaluation.test_multiple_choice import SAME, SUBJECTS, harness_task, write

Row = dict[str, Any]
Put = Callable[..., None]
FileRows = Callable[[str, str], None]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Put:
    """Puts rows on a Hub that is a table, from which everything is read then."""
    table: dict[tuple[str, str | None, str], list[Row]] = {}

    def load(
        path: str,
        name: str | None = None,
        split: str | None = None,
        data_files: dict[str, str] | None = None,
        **_: Any,
    ) -> Dataset | DatasetDict:
        if split is not None:
            parts = split.split("+") if data_files is None else [data_files[split]]
            return Dataset.from_list([row for part in parts for row in table[path, name, part]])
        splits = {part: rows for (own, config, part), rows in table.items() if (own, config) == (path, name)}
        return DatasetDict({part: Dataset.from_list(rows) for part, rows in splits.items()})

    def put(repository: str, config: str | None, split: str, *rows: Row) -> None:
        table[repository, config, split] = list(rows)

    monkeypatch.delenv("PARED_DATA", raising=False)
    monkeypatch.setattr(datasets, "load_dataset", load)
    return put


@pytest.fixture
def local(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FileRows:
    """Puts a file into a folder that PARED_DATA names from then on."""

    def put(file: str, text: str) -> None:
        path = tmp_path / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        monkeypatch.setenv("PARED_DATA", str(tmp_path))

    return put


# GLUE: a row of the Hub, and a line of the file with the same.
GLUE_ROWS: dict[str, tuple[str, Row, str]] = {
    "cola": ("dev", {"sentence": "A b.", "label": 1}, "gj\t1\t\tA b.\n"),
    "sst2": ("dev", {"sentence": "a b ", "label": 0}, "sentence\tlabel\na b \t0\n"),
    "mrpc": ("dev", {"sentence1": "a", "sentence2": "b", "label": 1}, "h\n1\t5\t6\ta\tb\n"),
    "stsb": ("dev", {"sentence1": "a", "sentence2": "b", "label": 2.5}, "h\n" + "x\t" * 7 + "a\tb\t2.5\n"),
    "mnli": ("dev_matched", {"premise": "a", "hypothesis": "b", "label": 2},
             "h\n" + "x\t" * 8 + "a\tb\tx\tcontradiction\n"),
    "mnli-mm": ("dev_mismatched", {"premise": "a", "hypothesis": "b", "label": 1},
                "h\n" + "x\t" * 8 + "a\tb\tx\tneutral\n"),
    "qqp": ("dev", {"question1": "a", "question2": "b", "label": 0}, "h\nx\tx\tx\ta\tb\t0\n"),
    "qnli": ("dev", {"question": "a", "sentence": "b", "label": 1}, "h\n0\ta\tb\tnot_entailment\n"),
    "rte": ("dev", {"sentence1": "a", "sentence2": "b", "label": 0}, "h\n0\ta\tb\tentailment\n"),
    "wnli": ("dev", {"sentence1": "a", "sentence2": "b", "label": 1}, "h\n0\ta\tb\t1\n"),
}  # fmt: skip
FOLDERS = {"cola": "CoLA", "sst2": "SST-2", "stsb": "STS-B", "mnli-mm": "MNLI"}


@pytest.mark.parametrize("task", GLUE_ROWS)
def test_glue_on_the_hub_is_glue_in_files(task: str, hub: Put, local: FileRows) -> None:
    part, row, lines = GLUE_ROWS[task]
    hub("nyu-mll/glue", task.removesuffix("-mm"), part.replace("dev", "validation"), row)
    there = find_examples(f"glue:{task}:dev")
    local(f"glue/{FOLDERS.get(task, task.upper())}/{part}.tsv", lines)
    here = find_examples(f"glue:{task}:dev")
    assert here.rows == there.rows
    assert len(here.rows) == 1
    assert there.origin.startswith("Hub data set nyu-mll/glue[")


def test_what_the_hub_does_not_label_is_told(hub: Put) -> None:
    with pytest.raises(ParedError, match="the Hub has no labels of the test part; use glue:rte:dev"):
        find_examples("glue:rte:test")
    hub("nyu-mll/glue", "rte", "train", {"sentence1": "a", "sentence2": "b", "label": -1})
    with pytest.raises(ParedError, match=r"nyu-mll/glue\[rte\], split 'train', row 1: expected a label from 0 to 1, "):
        find_examples("glue:rte:train")
    hub("nyu-mll/glue", "rte", "train", {"premise": "a", "hypothesis": "b", "label": 0})
    with pytest.raises(ParedError, match="row 1: expected sentence1, sentence2, label; sentence1 is missing"):
        find_examples("glue:rte:train")


def test_the_mismatched_part_is_never_the_matched_one(local: FileRows) -> None:
    local("glue/MNLI/test_matched_labelled.tsv", GLUE_ROWS["mnli"][2])
    assert len(find_examples("glue:mnli:test").rows) == 1
    with pytest.raises(ParedError, match=r"has no glue/MNLI/test_mismatched_labelled\.tsv"):
        find_examples("glue:mnli-mm:test")


# Tasks of writing: rows of the Hub; those of files are the same but for SVAMP.
GSM8K = {"question": "How many?", "answer": "One. #### 1"}
WRITTEN: dict[str, tuple[tuple[str, str | None, str], Row, Row]] = {
    "gsm8k": (("openai/gsm8k", "main", "test"), GSM8K, GSM8K),
    "svamp": (
        ("ChilleD/SVAMP", None, "test"),
        {"ID": "c", "Body": "He had 3.", "Question": "How many?", "Answer": "3.0"},
        {"context": "He had 3. How many?", "answer": "3.0"},
    ),
    "math500": (("HuggingFaceH4/MATH-500", None, "test"), *[{"problem": "p", "solution": "s", "answer": "1"}] * 2),
    "math": (
        ("EleutherAI/hendrycks_math", "algebra", "test"),
        {"problem": "p", "solution": "so \\boxed{1}", "level": "Level 2", "type": "Algebra"},
        {"problem": "p", "solution": "so \\boxed{1}", "answer": "1", "level": 2, "subject": "algebra"},
    ),
    "humaneval": (
        ("openai/openai_humaneval", None, "test"),
        *[{"prompt": "def f():", "canonical_solution": " 1", "test": "t", "entry_point": "f"}] * 2,
    ),
    "mbpp": (
        ("google-research-datasets/mbpp", "full", "test"),
        *[{"task_id": 11, "text": "t", "code": "c", "test_list": ["t"], "test_setup_code": ""}] * 2,
    ),
}


@pytest.mark.parametrize("name", TASKS)
def test_questions_on_the_hub_are_those_in_files(name: str, hub: Put, local: FileRows) -> None:
    task, (place, row, same) = task_of(name), WRITTEN[name]
    for subject in MATH_SUBJECTS:
        hub("EleutherAI/hendrycks_math", subject, "test")
    hub(*place, row)
    shown = {"gsm8k": [GSM8K], "mbpp": [{**same, "task_id": number, "code": f"c{number}"} for number in range(1, 5)]}
    hub("google-research-datasets/mbpp", "full", "train")
    hub("google-research-datasets/mbpp", "full", "prompt", *shown["mbpp"])
    hub("openai/gsm8k", "main", "train", *shown["gsm8k"])
    there = [{field: one[field] for field in task.fields} for one in rows_of(task)], examples_of(task, task.shots and 1)
    local(task.data.file, "\n".join(map(json.dumps, [same, *(shown["mbpp"] if name == "mbpp" else [])])))
    local("math/gsm8k_train.jsonl.gz", "")
    Path(data_file("math/gsm8k_train.jsonl.gz", "")).write_bytes(gzip.compress(json.dumps(GSM8K).encode()))
    here = [{field: one[field] for field in task.fields} for one in rows_of(task)], examples_of(task, task.shots and 1)
    assert here == there
    assert here[0] == [{field: same[field] for field in task.fields}]
    assert bool(here[1]) == bool(task.shots)


def test_a_row_of_the_hub_that_is_wrong_is_named(hub: Put) -> None:
    hub("openai/gsm8k", "main", "test", GSM8K, {"question": "How many?", "answer": "None."})
    with pytest.raises(ParedError, match=r"openai/gsm8k\[main\], split 'test', row 2: answer 'None.' says no number"):
        rows_of(task_of("gsm8k"))
    hub("ChilleD/SVAMP", None, "test", {"Body": "He had 3.", "Answer": "3.0"})
    with pytest.raises(ParedError, match="row 1: expected Body, Question, Answer; Question is missing, got Answer, Bo"):
        rows_of(task_of("svamp"))


def test_instructions_come_from_the_hub(hub: Put) -> None:
    code = {"text": "t", "code": "c"}
    rows = {
        "gsm8k:train": (("openai/gsm8k", "main", "train"), GSM8K),
        "gsm8k:test": (("openai/gsm8k", "main", "test"), GSM8K),
        "math500": (("HuggingFaceH4/MATH-500", None, "test"), {"problem": "p", "solution": "s"}),
        "mbpp:train": (("google-research-datasets/mbpp", "full", "train"), {**code, "task_id": 601}),
        "alpaca": (("tatsu-lab/alpaca", None, "train"), {"instruction": "i", "input": "", "output": "o"}),
        "alpaca-cleaned": (("yahma/alpaca-cleaned", None, "train"), {"instruction": "i", "input": "", "output": "c"}),
    }
    assert rows.keys() == SETS.keys()
    for place, row in rows.values():
        hub(*place, row)
    hub("google-research-datasets/mbpp", "full", "test", {**code, "task_id": 11})
    hub("google-research-datasets/mbpp", "full", "prompt", {**code, "task_id": 2})
    for name, (place, row) in rows.items():
        found, origin = find_instructions(f"instruct:{name}")
        assert [(one.instruction, one.answer) for one in found] == [
            tuple(row[field] for field in row if row[field])[:2]
        ]
        assert origin.startswith(f"Hub data set {place[0]}")


def test_texts_come_from_the_hub(hub: Put) -> None:
    for corpus in CORPORA.values():
        if corpus.hub is not None:
            where = corpus.hub
            hub(where.repository, where.config, where.file or where.split, {"text": f"text of {where}"})
    for name, corpus in CORPORA.items():
        if corpus.hub is None:
            with pytest.raises(ParedError, match=f"text '{name}' is read from the folder .* or use file:PATH"):
                find_text(name)
        else:
            assert find_text(name).documents == (f"text of {corpus.hub}",)
    assert find_text("c4:train").origin == "Hub data set allenai/c4, en/c4-train.00000-of-01024.json.gz"
    assert find_text("c4:validation").origin == "Hub data set allenai/c4, en/c4-validation.00000-of-00008.json.gz"
    hub("mine/own", None, "train", {"body": "b"})
    with pytest.raises(
        ParedError, match="Hub data set mine/own, split 'train', row 1: expected text; text is missing, got"
    ):
        find_text("mine/own:train:text")
    hub("mine/own", None, "train")
    with pytest.raises(ParedError, match="Hub data set mine/own, split 'train' has no rows"):
        find_text("mine/own:train:body")


# Tasks of choosing.


@pytest.fixture
def harness_hub(hub: Put) -> Put:
    """The Hub with one row of every task as the harness's own definition reads it."""
    for name in set(CHOICES) - {"mmlu"}:
        where, row, _ = SAME[name]
        config = harness_task(where, row).config
        for split in (config.training_split, config.validation_split, config.test_split):
            if split:
                hub(config.dataset_path, config.dataset_name, split, row)
    for subject in SUBJECTS:
        for split in ("dev", "test"):
            hub("cais/mmlu", subject.removeprefix("mmlu_"), split, {**SAME["mmlu"][1], "subject": subject})
    return hub


def test_choices_on_the_hub_are_those_in_files(
    harness_hub: Put, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = TINY_MODELS["llama"]()
    names = [*sorted(set(CHOICES) - {"mmlu"}), "mmlu"]
    there = evaluate_choices(model, tokenizer, prepare(names), Silent().stage)
    monkeypatch.setenv("PARED_DATA", str(tmp_path))
    for name in names:
        row = SAME[name][2]
        rows = [{**row, "subject": subject.removeprefix("mmlu_")} for subject in SUBJECTS] if name == "mmlu" else [row]
        write(tmp_path, name, *rows)
    here = evaluate_choices(model, tokenizer, prepare(names), Silent().stage)
    for ours, theirs in zip(here, there, strict=True):
        assert (ours.task, ours.rows, ours.metrics) == (theirs.task, theirs.rows, pytest.approx(theirs.metrics))
        if ours.task != "mmlu":
            assert [row["right"] for row in ours.answers] == [row["right"] for row in theirs.answers], ours.task
        gold = SAME[ours.task][2].get("gold")
        assert ours.task == "mmlu" or gold is None or ours.answers[0]["right"] == gold, ours.task
    assert {part["task"] for part in there[-1].answers} == set(SUBJECTS)


def place_of(where: str, row: Row) -> tuple[str, str | None, str]:
    """Where the harness's own definition of a task has its training rows."""
    config = harness_task(where, row).config
    return config.dataset_path, config.dataset_name, config.training_split


def test_the_hub_has_examples_to_show_apart_from_what_is_measured(
    harness_hub: Put, tokenizer: PreTrainedTokenizerFast
) -> None:
    where, row, _ = SAME["arc_easy"]
    harness_hub(*place_of(where, row), row, {**row, "question": "w7"})
    shown = prepare(["arc_easy"], shots=1).loaded["tasks"]["arc_easy"]
    asked = shown.fewshot_context(next(iter(shown.test_docs())), 1)
    assert asked.count("Question: ") == 2
    with pytest.raises(ParedError, match="task arc_easy has 2 examples to show, got a request for 2"):
        prepare(["arc_easy"], shots=2)
    with pytest.raises(ParedError, match="task lambada_openai has no examples to show apart from"):
        prepare(["lambada_openai"], shots=1)


def test_a_row_of_the_hub_that_is_no_question_is_named_before_a_model_is_loaded(harness_hub: Put) -> None:
    where, row, _ = SAME["arc_easy"]
    repository, config, _ = place_of(where, row)
    harness_hub(repository, config, "test", row, {**row, "answerKey": "Z"})
    assert len(prepare(["arc_easy"], limit=1).loaded["tasks"]) == 1
    with pytest.raises(ParedError, match="task arc_easy, row 2 of Hub data set allenai/ai2_arc: expected a question"):
        prepare(["arc_easy"])


def test_a_task_the_harness_has_not_is_no_unreadable_data(hub: Put, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scoring, "FOLDERS", ("arc",))
    with pytest.raises(ParedError, match=r"lm-evaluation-harness .* has no task piqa, 0\.4\.13 has; install that"):
        prepare(["piqa"])


def test_every_evaluation_shows_the_same_examples(harness_hub: Put, tokenizer: PreTrainedTokenizerFast) -> None:
    where, row, _ = SAME["arc_easy"]
    harness_hub(*place_of(where, row), *({**row, "question": f"w{number}"} for number in range(3, 40)))
    tasks, model = prepare(["arc_easy"], shots=3), TINY_MODELS["llama"]()
    first, second = (evaluate_choices(model, tokenizer, tasks, Silent().stage)[0] for _ in range(2))
    assert first.answers == second.answers
