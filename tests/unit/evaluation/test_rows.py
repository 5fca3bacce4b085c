"""Rows of the user's files: conversations are text by the chat template; what is no text is told by file and row."""

import codecs
import gzip
import json
import os
from pathlib import Path
from typing import Any

import pytest
from tiny_tokenizer import tiny_tokenizer
from transformers import PreTrainedTokenizerFast

import pared
from pared import ParedError
from pared.data.instructions import cut_instructions, find_instructions
from pared.data.texts import find_text, require_text
from pared.data.windows import NO_LABEL, cut

TEMPLATE = (
    "{% for m in messages %}{{ 'w9 ' if m.role == 'user' else 'w10 ' if m.role == 'assistant' else 'w11 ' }}"
    "{{ m.content }} w2\n{% endfor %}{% if add_generation_prompt %}w10 {% endif %}"
)
TALK = [{"role": "user", "content": "w5 w6"}, {"role": "assistant", "content": "w7 w8"}]
SHAREGPT = [{"from": "human", "value": "w5 w6"}, {"from": "gpt", "value": "w7 w8"}]
PARTS = [{"role": "user", "content": [{"type": "text", "text": "w5 "}, {"type": "text", "text": "w6"}]}, TALK[1]]
SAID = "w9 w5 w6 w2\nw10 w7 w8 w2\n"


@pytest.fixture(scope="module")
def chatty() -> PreTrainedTokenizerFast:
    tokenizer = tiny_tokenizer(64)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def rows(path: Path, *values: Any) -> str:
    path.write_text("".join(json.dumps(value) + "\n" for value in values))
    return f"file:{path}"


@pytest.mark.parametrize("field", ["messages", "conversations", "conversation"])
@pytest.mark.parametrize("talk", [TALK, SHAREGPT, PARTS], ids=["openai", "sharegpt", "parts"])
def test_conversations_are_text_by_the_chat_template(
    talk: list[Any], field: str, tmp_path: Path, chatty: PreTrainedTokenizerFast
) -> None:
    name = rows(tmp_path / "rows.jsonl", {field: talk}, {"text": "w12"})
    text = find_text(name, tokenizer=chatty)
    assert text.documents == (SAID, "w12")
    assert cut(text, chatty, 8, 1).tokens.tolist() == [[9, 5, 6, 2, 10, 7, 8, 2]]


def test_of_instructions_the_last_message_is_learned(tmp_path: Path, chatty: PreTrainedTokenizerFast) -> None:
    rows(tmp_path / "rows.jsonl", {"messages": [{"role": "system", "content": "w3"}, *TALK]})
    windows = cut_instructions(f"instruct:{tmp_path}/rows.jsonl", chatty, 32, None, "alpaca")
    assert windows.tokens.tolist() == [[11, 3, 2, 9, 5, 6, 2, 10, 7, 8, 2]]
    assert windows.labels is not None
    assert windows.labels.tolist() == [[*[NO_LABEL] * 8, 7, 8, 2]]
    rows(tmp_path / "rows.jsonl", {"messages": TALK[:1]})
    with pytest.raises(ParedError, match="row 1: expected a conversation that ends with the answer of 'assistant'"):
        find_instructions(f"instruct:{tmp_path}/rows.jsonl", chatty)


@pytest.mark.parametrize("more", [{"conversation": "id-1"}, {"messages": ""}, {"conversations": 7}, {"messages": TALK}])
@pytest.mark.parametrize("fields", [("prompt", "response"), ("question", "answer"), ("instruction", "output")])
def test_a_row_with_a_known_pair_is_read_by_it_whatever_else_it_holds(
    fields: tuple[str, str], more: dict[str, Any], tmp_path: Path, chatty: PreTrainedTokenizerFast
) -> None:
    """A string is a sequence too: rows with the number of their conversation were refused."""
    name = rows(tmp_path / "rows.jsonl", {fields[0]: "w5", fields[1]: "w6", **more})
    (found,), _ = find_instructions(name.replace("file:", "instruct:"), chatty)
    assert (found.instruction, found.answer, found.is_prompt) == ("w5", "w6", False)
    if fields[0] == "instruction":
        assert "w5" in find_text(name, tokenizer=chatty).joined


def test_a_list_is_the_conversation_where_another_field_holds_its_number(
    tmp_path: Path, chatty: PreTrainedTokenizerFast
) -> None:
    name = rows(tmp_path / "rows.jsonl", {"messages": "id-1", "conversation": TALK, "prompt": "w5"})
    assert find_text(name, tokenizer=chatty).documents == (SAID,)
    (found,), _ = find_instructions(name.replace("file:", "instruct:"), chatty)
    assert found.is_prompt


def test_calibration_and_perplexity_read_conversations(tmp_path: Path, chatty: PreTrainedTokenizerFast) -> None:
    from tiny_models import TINY_MODELS

    name = rows(tmp_path / "rows.jsonl", *[{"messages": TALK * 4}] * 30)
    model = TINY_MODELS["llama"]()
    calibration = pared.Calibration(text=name, samples=4, length=16, dtype="float32")
    result = pared.compress(model, chatty, pared.Recipe(method="svd-llm", keep=0.6, calibration=calibration))
    assert result.calibration is not None
    assert result.calibration["windows"] == 4
    assert pared.perplexity(model, chatty, name, length=16, windows=2).predicted == 30


@pytest.mark.parametrize(
    ("row", "template", "message"),
    [
        ({"messages": TALK}, None, "row 2 is a conversation, and this model's tokenizer has no chat template"),
        ({"messages": TALK}, "{{ raise_exception('roles must alternate') }}", "does not take .* roles must alternate"),
        ({"messages": TALK}, "{{ nothing( }}", "chat template does not take this conversation"),
        ({"messages": []}, TEMPLATE, "row 2: expected 'messages' to be a list of messages"),
        ({"messages": "hello"}, TEMPLATE, "row 2: .* got 'messages' 'hello'; a conversation is a list"),
        ({"messages": ["hello"]}, TEMPLATE, "row 2, message 1: expected"),
        ({"messages": [*TALK, {"role": "user", "content": None}]}, TEMPLATE, "row 2, message 3: expected"),
        ({"messages": [{"content": "w5"}]}, TEMPLATE, "row 2, message 1: expected"),
        (None, TEMPLATE, "row 2: expected an object whose 'text' field is a string, got null"),
        ({"text": None}, TEMPLATE, "row 2: .* got 'text' null"),
        ({"text": 5}, TEMPLATE, "row 2: .* got 'text' 5"),
        ({"text": ["w5"]}, TEMPLATE, r"row 2: .* got 'text' \['w5'\]"),
        ({"content": "w5", "id": 1}, TEMPLATE, r"row 2: .* got \['content', 'id'\]"),
        ({}, TEMPLATE, r"row 2: .* got \[\]"),
        ([], TEMPLATE, "row 2: .* got list"),
        (7, TEMPLATE, "row 2: .* got int"),
        ({"instruction": "w5", "input": "", "output": None}, TEMPLATE, "row 2: .* 'output' null"),
        ({"text": "w5 \ud83d w6"}, TEMPLATE, r"row 2: half of a surrogate pair, .ud83d"),
        ({"text": "w5", "note": "\udc00"}, TEMPLATE, r"row 2: half of a surrogate pair, .udc00"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, TEMPLATE, "row 2: half of a surrogate pair"),
    ],
)
def test_a_row_that_is_no_text_is_told_by_file_and_row(
    row: Any, template: str | None, message: str, tmp_path: Path
) -> None:
    tokenizer = tiny_tokenizer(64)
    tokenizer.chat_template = template
    name = rows(tmp_path / "rows.jsonl", {"text": "w5"}, row)
    with pytest.raises(ParedError, match=message) as error:
        find_text(name, tokenizer=tokenizer)
    assert str(tmp_path / "rows.jsonl") in str(error.value)
    assert "\n" not in str(error.value)


def test_a_whole_surrogate_pair_is_a_character(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"text": "w5 \\ud83d\\ude00"}\n')
    assert find_text(f"file:{tmp_path}/rows.jsonl").documents == ("w5 \U0001f600",)


def test_half_a_pair_among_labelled_rows_and_instructions_is_told_too(tmp_path: Path) -> None:
    from pared.data import find_examples

    rows(tmp_path / "rows.jsonl", {"text": "w5 \ud83d", "label": 1, "prompt": "\ud83d", "response": "w5"})
    for read in (lambda: find_examples(f"file:{tmp_path}/rows.jsonl"),
                 lambda: find_instructions(f"instruct:{tmp_path}/rows.jsonl")):  # fmt: skip
        with pytest.raises(ParedError, match="row 1: half of a surrogate pair"):
            read()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", "is empty"),
        ("a.jsonl", b"\n\n", "is empty"),
        ("a.txt", codecs.BOM_UTF8, "is empty"),
        ("a.txt", "w5 w6".encode("utf-16"), "is not UTF-8 .*UTF-16: iconv"),
        ("a.txt", "w5 w6".encode("utf-32"), "is not UTF-8 .*UTF-32: iconv"),
        ("a.txt", "w5 w6".encode("utf-16-le"), "holds zero bytes"),
        ("a.txt", bytes(range(256)), "is not UTF-8"),
        ("a.txt", gzip.compress(b"w5 w6", mtime=0), "is gzipped; call it a.txt.gz"),
        ("a.jsonl", gzip.compress(b'{"text": "w5"}', mtime=0), "is gzipped; call it a.jsonl.gz"),
        ("a.txt.gz", b"w5 w6", "not readable as gzip"),
        ("a.jsonl", b'{"text": ' + b"[" * 100_000, "row 1: not JSON"),
        ("a.jsonl", b'{"text": ' + b"9" * 10_000 + b"}", "row 1: not JSON|row 1: expected"),
    ],
)
def test_a_file_that_is_no_text_is_told_in_one_line(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ParedError, match=message) as error:
        find_text(f"file:{tmp_path}/{name}")
    assert name in str(error.value)
    assert len(str(error.value)) < 400 + len(str(tmp_path))


def test_windows_line_ends_and_a_mark_at_the_start_are_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(codecs.BOM_UTF8 + b"w5\r\nw6\r\n\r\nw7")
    assert find_text(f"file:{tmp_path}/a.txt").joined == "w5\nw6\n\nw7"
    (tmp_path / "a.jsonl").write_bytes(codecs.BOM_UTF8 + b'{"text": "w5"}\r\n{"text": "w6"}\r\n')
    assert find_text(f"file:{tmp_path}/a.jsonl").documents == ("w5", "w6")


def test_a_file_without_its_prefix_is_asked_about(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mytext.txt").write_text("w5")
    os.mkdir(tmp_path / "folder.txt")
    for name, message in (
        ("mytext.txt", "unknown text 'mytext.txt'; did you mean 'file:mytext.txt'?"),
        ("./mytext.txt", "did you mean 'file:./mytext.txt'?"),
        (str(tmp_path / "mytext.txt"), f"did you mean 'file:{tmp_path}/mytext.txt'?"),
        ("gone.jsonl", "did you mean 'file:gone.jsonl' (no such file is there)?"),
        ("wikitext2:tran", "did you mean 'wikitext2:train'?"),
        ("a sentence that is the text itself", "unknown text 'a sentence that is the text itself'; Valid: "),
        ("file:folder.txt", "folder.txt: Is a directory"),
        ("file:", "expected .txt or .jsonl"),
        ("", "unknown text ''"),
        ("embedded:evl", "did you mean 'embedded:eval'?"),
    ):
        with pytest.raises(ParedError) as error:
            require_text(name)
        assert message in str(error.value)


@pytest.mark.parametrize(
    ("name", "learned", "measured"),
    [
        ("wikitext2", "wikitext2:train", "wikitext2:test"),
        ("ptb", "ptb:train", "ptb:test"),
        ("c4", "c4:train", "c4:validation"),
    ],
)
def test_a_corpus_without_its_part_is_offered_the_part_that_is_meant(name: str, learned: str, measured: str) -> None:
    """Regression: what is calibrated on was offered the part that results are reported on."""
    for evaluation, meant in ((False, learned), (True, measured)):
        with pytest.raises(ParedError, match=f"unknown text '{name}'; did you mean '{meant}'"):
            require_text(name, evaluation)


@pytest.mark.parametrize("method", ["svd", "magnitude"])
def test_a_text_that_nobody_will_read_is_checked_too(method: str, tmp_path: Path) -> None:
    from tiny_models import TINY_MODELS

    TINY_MODELS["llama"]().save_pretrained(tmp_path / "model")
    tiny_tokenizer(64).save_pretrained(tmp_path / "model")
    recipe = {"model": str(tmp_path / "model"), "out": str(tmp_path / "out"), "method": method,
              "calibration": {"text": "wikitext3:train"}, "evaluation": None,
              **({"sparsity": 0.5} if method == "magnitude" else {})}  # fmt: skip
    with pytest.raises(ParedError, match="unknown text 'wikitext3:train'; did you mean 'wikitext2:train'"):
        pared.run(pared.Recipe.of(recipe))
