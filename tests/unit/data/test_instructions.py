"""Instructions become windows in which only the answer is learned."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from pared import ParedError
from pared.data.documents import alpaca_text
from pared.data.instructions import cut_instructions, find_instructions
from pared.data.templates import prompt, templates
from pared.data.texts import find_text
from pared.data.windows import NO_LABEL


def written(path: Path, rows: list[dict[str, Any]]) -> str:
    content = "\n".join(map(json.dumps, rows)) + "\n"
    path.write_bytes(gzip.compress(content.encode()) if path.suffix == ".gz" else content.encode())
    return f"instruct:{path}"


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz"])
@pytest.mark.parametrize(
    ("asked", "answer"), [("prompt", "response"), ("query", "response"), ("question", "answer"), ("text", "code")]
)
def test_the_usual_fields_are_read(tmp_path: Path, asked: str, answer: str, suffix: str) -> None:
    name = written(tmp_path / f"rows{suffix}", [{asked: "w3", answer: "w4", "other": 1}])
    (found,), origin = find_instructions(name)
    assert (found.instruction, found.answer, found.input) == ("w3", "w4", "")
    assert origin == str(tmp_path / f"rows{suffix}")


def test_only_the_answer_and_its_end_are_learned(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [{"prompt": "w3 w4 w5", "response": "w6 w7"}, {"prompt": "w3", "response": "w8"}]
    windows = cut_instructions(written(tmp_path / "rows.jsonl", rows), tokenizer, 16, None, "plain")
    end = tokenizer.eos_token_id
    for row, (asked, answer) in enumerate((("w3 w4 w5\n", "w6 w7"), ("w3\n", "w8"))):
        before = tokenizer(asked, add_special_tokens=False)["input_ids"]
        after = [*tokenizer(answer, add_special_tokens=False)["input_ids"], end]
        length = len(before) + len(after)
        assert windows.tokens[row, :length].tolist() == before + after
        assert windows.labels[row, :length].tolist() == [NO_LABEL] * len(before) + after
        assert windows.labels[row, length:].eq(NO_LABEL).all()
        assert windows.mask[row].tolist() == [1] * length + [0] * (windows.tokens.shape[1] - length)


def test_a_tokenizer_that_begins_every_text_begins_prompts_too(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    import copy

    from tokenizers.processors import TemplateProcessing

    starting = copy.deepcopy(tokenizer)
    first = starting.bos_token
    starting.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{first} $A", special_tokens=[(first, starting.bos_token_id)]
    )
    name = written(tmp_path / "rows.jsonl", [{"prompt": "w3", "response": "w4"}])
    with_start, without = (cut_instructions(name, one, 16, None, "plain") for one in (starting, tokenizer))
    assert with_start.tokens[0].tolist() == [starting.bos_token_id, *without.tokens[0].tolist()]


def test_of_instructions_a_teacher_is_followed_in_the_answer_alone() -> None:
    from tiny_models import TINY_MODELS

    from pared.training.distill import distillation_loss

    teacher, student = TINY_MODELS["llama"](), TINY_MODELS["llama"]()
    with torch.no_grad():
        student.model.layers[0].mlp.up_proj.weight.mul_(0.5)
    loss = distillation_loss(teacher, {"temperature": 1.0, "text": 0.0, "hidden": 0.0})
    ids = torch.randint(3, 64, (1, 9))
    labels = ids.clone()
    labels[:, :6] = NO_LABEL
    with torch.no_grad():
        logs = [model(ids).logits[0, 5:8].log_softmax(-1) for model in (teacher, student)]
        expected = float((logs[0].exp() * (logs[0] - logs[1])).sum(-1).mean())
    assert float(loss(student, {"input_ids": ids, "labels": labels}).detach()) == pytest.approx(expected, rel=1e-4)


def test_prompts_that_leave_no_answer_are_left_out_and_told(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [{"prompt": "w3 " * 20, "response": "w6"}, {"prompt": "w3", "response": "w8 " * 30}]
    name = written(tmp_path / "rows.jsonl", rows)
    windows = cut_instructions(name, tokenizer, 12, None, "plain")
    assert windows.tokens.shape == (1, 12)
    assert bool((windows.labels != NO_LABEL).any())
    assert "1 of 2 prompts fill 12 tokens and are left out" in caplog.text
    with pytest.raises(ParedError, match="every prompt fills its 1 tokens"):
        cut_instructions(name, tokenizer, 1, None, "plain")


PLAIN = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:"
)
WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
    "response that appropriately completes the request.\n\n### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n"
    "### Response:"
)


@pytest.mark.parametrize(
    ("instruction", "beside"),
    [
        ("Classify.\n\nA: a cat\nB: a dog", ""),
        ("  Sort these:\n3\n1\n", ""),
        ("Say why.\r\nBriefly.", ""),
        ("Add.\nShow the sum.", "1\n2"),
        ("Add.", "1 and 2"),
        ("Add.", ""),
    ],
)
def test_an_instruction_of_several_lines_without_an_input_has_no_input_section(
    tmp_path: Path, instruction: str, beside: str
) -> None:
    row = {"instruction": instruction, "input": beside, "output": "w5"}
    form = WITH_INPUT if beside else PLAIN
    expected = form.format(**row)
    assert alpaca_text(row).rsplit("\nw5", 1)[0] == expected
    written(tmp_path / "rows.jsonl", [row])
    assert find_text(f"file:{tmp_path}/rows.jsonl").documents == (alpaca_text(row),)
    (found,), _ = find_instructions(f"instruct:{tmp_path}/rows.jsonl")
    assert prompt("alpaca", found.instruction, found.input).removesuffix("\n") == expected
    assert prompt("plain", instruction).startswith(instruction)


def test_lines_after_the_first_are_the_input_in_basels_template_alone() -> None:
    assert prompt("basel", "Add.\n1\n2") == prompt("basel", "Add.", "1\n2")
    assert prompt("basel", "Add.\n1", "2") == prompt("alpaca", "Add.\n1", "2")
    for template in ("alpaca", "alpaca-lora", "plain"):
        assert "Add.\n1\n2" in prompt(template, "Add.\n1\n2")
        assert "### Input" not in prompt(template, "Add.\n1\n2")


def test_what_mbpp_is_measured_on_is_not_trained_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"text": f"t{number}", "code": "c", "task_id": number} for number in (3, 11, 510, 601, 974)]
    (tmp_path / "code").mkdir()
    written(tmp_path / "code" / "mbpp.jsonl", rows)
    monkeypatch.setenv("PARED_DATA", str(tmp_path))
    assert [found.instruction for found in find_instructions("instruct:mbpp:train")[0]] == ["t601", "t974"]


ADD_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
    "response that appropriately completes the request.\n\n### Instruction:\nAdd.\n\n### Input:\n1 and 2\n\n"
    "### Response:"
)
ADD = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\nAdd.\n\n### Response:"
)


@pytest.mark.parametrize(("template", "end"), [("alpaca", ""), ("basel", ""), ("alpaca-lora", "\n")])
def test_templates_are_the_official_ones_to_the_last_character(template: str, end: str) -> None:
    assert prompt(template, "Add.", "1 and 2") == ADD_WITH_INPUT + end
    assert prompt(template, "Add.") == ADD + end


def test_every_template_is_tested_to_the_last_character() -> None:
    assert set(templates()) == {"alpaca", "basel", "alpaca-lora", "plain"}
    assert prompt("plain", "Add.", "1 and 2") == "Add.\n\n1 and 2\n"
    assert prompt("plain", "Add.") == "Add.\n"


def test_an_answer_is_tokenised_as_it_stands_behind_its_prompt(tmp_path: Path) -> None:
    """A tokenizer that marks the beginning of a text would mark the answer's, were it tokenised by itself."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({"?": 0, "▁ask": 1, "▁word": 2, "word": 3, ":": 4}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Metaspace(), pre_tokenizers.Punctuation(), pre_tokenizers.Split("\n", "isolated")]
    )
    marking = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="?", eos_token="?")
    assert marking("word", add_special_tokens=False)["input_ids"] == [2]
    name = written(tmp_path / "rows.jsonl", [{"prompt": "ask", "response": "word"}])
    windows = cut_instructions(name, marking, 99, None, "alpaca")
    answer = windows.tokens[0][windows.labels[0] != NO_LABEL].tolist()
    assert answer == [3, 0]


@pytest.mark.parametrize("template", ["alpaca", "basel", "alpaca-lora", "plain"])
def test_braces_in_an_instruction_are_text(template: str) -> None:
    made = prompt(template, "format {input} and {instruction}", "with {instruction}")
    assert "format {input} and {instruction}" in made
    assert "with {instruction}" in made
    assert template in templates()


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"prompt": "w3"}], "rows.jsonl, row 1: expected strings prompt and response"),
        ([{"prompt": "w3", "response": "w4"}, {"prompt": 3, "response": "w4"}], "row 2: expected strings"),
        ([], "have no rows"),
    ],
)
def test_a_row_that_is_none_names_file_and_row(tmp_path: Path, rows: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(ParedError) as error:
        find_instructions(written(tmp_path / "rows.jsonl", rows))
    assert message in str(error.value)


def test_what_is_unknown_is_refused(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PARED_DATA", raising=False)
    name = written(tmp_path / "rows.jsonl", [{"prompt": "w3", "response": "w4"}])
    for asked, template, message in (
        ("instruct:gsm8k:train", "alpaca", "Hub data set openai/gsm8k[main], split 'train': cannot be read ("),
        ("instruct:gsm9k:train", "alpaca", "unknown instructions 'instruct:gsm9k:train'"),
        (name, "alpacca", "unknown template 'alpacca'; did you mean 'alpaca'"),
        ("instruct:/nowhere.jsonl", "alpaca", "/nowhere.jsonl: No such file"),
    ):
        with pytest.raises(ParedError) as error:
            cut_instructions(asked, tokenizer, 8, None, template)
        assert message in str(error.value)


def test_a_model_learns_answers_from_a_file(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    from tiny_models import TINY_MODELS

    from pared import tune
    from pared.schema.training import TrainingConfig

    TINY_MODELS["llama"]().save_pretrained(tmp_path / "dense")
    tokenizer.save_pretrained(tmp_path / "dense")
    rows = [{"prompt": f"w{i} w{i}", "response": f"w{i + 1}"} for i in range(3, 50)]
    options = {"prunes": 2, "new": 1, "keep_ratio": 0.9, "keeping_epochs": 1.0, "pruning_epochs": 1.0,
               "post_epochs": 1.0}  # fmt: skip
    made = tune(TrainingConfig.of({
        "model": str(tmp_path / "dense"), "out": str(tmp_path / "out"), "method": "basel", "options": options,
        "data": [written(tmp_path / "rows.jsonl", rows)], "template": "plain", "length": 16, "validation": 4,
        "batch": 16, "epochs": 2.0, "learning_rate": 1e-2, "evaluation": None,
    }))  # fmt: skip
    first, last = (stage["loss"] for stage in made.manifest.training[-1].stages)
    assert last[1] < first[0]
    assert made.manifest.training[-1].data[0]["labels"] == 2 * len(rows)
    assert torch.isfinite(torch.tensor(last[1]))
