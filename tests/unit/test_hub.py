"""Rows of the Hub, where PARED_DATA names no folder, are those of the files; the Hub itself is a table here."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
from datasets import Dataset, DatasetDict
from test_choice import SAME, SUBJECTS, harness_task, write
from tiny_models import TINY_MODELS
from transformers import PreTrainedTokenizerFast

from pared import ParedError
from pared.engine import Silent
from pared.evaluation.choice import CHOICES, evaluate_choices, prepare
from pared.evaluation.tasks import TASKS, examples_of, rows_of, task_of
from pared.sources import find_examples
from pared.sources.instructions import find_instructions
from pared.sources.texts import find_text

Row = dict[str, Any]
Put = Callable[..., None]
FileRows = Callable[[str, str], None]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Put:
    """Puts rows on a Hub that is a table, from which everything is read then."""
    table: dict[tuple[str, str | None, str], list[Row]] = {}

    def load(path: str, name: str | None = None, split: str | None = None, **_: Any) -> Dataset | DatasetDict:
        if split is not None:
            return Dataset.from_list([row for part in split.split("+") for row in table[path, name, part]])
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
    assert here.classes == there.classes
    assert there.origin.startswith("Hub data set nyu-mll/glue[")


def test_what_the_hub_does_not_label_is_told(hub: Put) -> None:
    with pytest.raises(ParedError, match="the Hub has no labels of the test part; use glue:rte:dev"):
        find_examples("glue:rte:test")
    hub("nyu-mll/glue", "rte", "train", {"sentence1": "a", "sentence2": "b", "label": -1})
    with pytest.raises(ParedError, match=r"nyu-mll/glue\[rte\], split 'train', row 1: expected a label from 0 to 1, "):
        find_examples("glue:rte:train")


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
    hub(*place, row)
    hub("google-research-datasets/mbpp", "full", "train")
    hub("google-research-datasets/mbpp", "full", "prompt", *({**WRITTEN["mbpp"][1], "task_id": i} for i in range(1, 5)))
    hub("openai/gsm8k", "main", "train", GSM8K)
    shots = {"gsm8k": 1, "mbpp": 3}.get(name, 0)
    there, shown = [task.prompt(one) for one in rows_of(task)], examples_of(task, shots)
    local(task.data.file, json.dumps(same))
    assert [task.prompt(one) for one in rows_of(task)] == there
    assert shown.count("\n\n") >= shots


def test_a_row_of_the_hub_that_is_wrong_is_named(hub: Put) -> None:
    hub("openai/gsm8k", "main", "test", GSM8K, {"question": "How many?", "answer": "None."})
    with pytest.raises(ParedError, match=r"openai/gsm8k\[main\], split 'test', row 2: answer 'None.' says no number"):
        rows_of(task_of("gsm8k"))


def test_instructions_and_texts_come_from_the_hub(hub: Put) -> None:
    hub("openai/gsm8k", "main", "train", GSM8K)
    found, origin = find_instructions("instruct:gsm8k:train")
    assert (found[0].instruction, found[0].answer) == (GSM8K["question"], GSM8K["answer"])
    assert origin == "Hub data set openai/gsm8k[main], split 'train'"
    hub("Salesforce/wikitext", "wikitext-2-raw-v1", "test", {"text": " = A = \n"}, {"text": ""})
    assert find_text("wikitext2:test").documents == (" = A = \n", "")
    hub("mine/own", None, "train", {"body": "b"})
    with pytest.raises(ParedError, match="Hub data set mine/own has no field 'text'"):
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
    assert {part["task"] for part in there[-1].answers} >= set(SUBJECTS)


def test_the_hub_has_examples_to_show_apart_from_what_is_measured(
    harness_hub: Put, tokenizer: PreTrainedTokenizerFast
) -> None:
    shown = prepare(["arc_easy"], shots=1).loaded["tasks"]["arc_easy"]
    asked = shown.fewshot_context(next(iter(shown.test_docs())), 1)
    assert asked.count("Question: ") == 2
    with pytest.raises(ParedError, match="task arc_easy has 1 examples to show, found 2 asked for"):
        prepare(["arc_easy"], shots=2)
    with pytest.raises(ParedError, match="task lambada_openai has no examples to show apart from"):
        prepare(["lambada_openai"], shots=1)
