"""Texts by name, from files and folders; windows that are reproducible and say who they are."""

import gzip
import hashlib
import importlib.util
import json
from pathlib import Path

import pytest
import torch
from tiny_tokenizer import tiny_tokenizer
from tokenizers.processors import TemplateProcessing

from pared.data.corpora import CORPORA, HELD_OUT, wikitext_rows
from pared.data.documents import alpaca_text
from pared.data.texts import Text, find_text, held_out
from pared.data.windows import cut, digest_of
from pared.errors import ParedError

TOKENIZER = tiny_tokenizer(64)
SPECIAL = [("w1", 1), ("w2", 2)]


def words(count: int, start: int = 0) -> str:
    return " ".join(f"w{(start + index) % 64}" for index in range(count))


def numbers(count: int) -> Text:
    return Text("numbers", (words(count),), "this test")


def store(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    raw = content.encode("utf-8") if isinstance(content, str) else content
    path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else raw)
    return path


def rows(*texts: str) -> str:
    return "".join(json.dumps({"text": text, "id": 3}, ensure_ascii=False) + "\n" for text in texts)


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty PARED_DATA folder."""
    monkeypatch.setenv("PARED_DATA", str(tmp_path))
    return tmp_path


# Files


@pytest.mark.parametrize("name", ["story.txt", "story.txt.gz"])
def test_text_file_is_one_document(tmp_path: Path, name: str):
    path = store(tmp_path / name, "Zwölf Boxkämpfer\n\n")
    text = find_text(f"file:{path}")
    assert text.documents == ("Zwölf Boxkämpfer\n\n",)
    assert text.origin == str(path)
    assert text.name == f"file:{path}"
    assert not text.stand_in


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz"])
def test_jsonl_file_is_one_document_a_row_joined_by_blank_lines(tmp_path: Path, name: str):
    path = store(tmp_path / name, rows("one\ntwo", "drei") + "\n" + rows("vier"))
    text = find_text(f"file:{path}")
    assert text.documents == ("one\ntwo", "drei", "vier")
    assert text.joined == "one\ntwo\n\ndrei\n\nvier"


def test_file_in_the_home_folder_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    store(tmp_path / "story.txt", "at home")
    assert find_text("file:~/story.txt").joined == "at home"


@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85"])
def test_line_separators_inside_a_json_string_do_not_end_the_row(tmp_path: Path, separator: str, line_end: str):
    """Rows were once cut at U+2028 and its kin, which JSON allows inside strings and web text contains."""
    path = store(tmp_path / "rows.jsonl", rows(f"one{separator}two", "three").replace("\n", line_end))
    assert find_text(f"file:{path}").documents == (f"one{separator}two", "three")


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ('{"text": "cut of', "not JSON"),
        ('{"txet": "a"}', r"expected an object whose 'text' field is a string, got \['txet'\]"),
        ('{"text": 5}', "expected an object whose 'text' field is a string"),
        ('["text"]', "expected an object whose 'text' field is a string, got list"),
        ('"text"', "expected an object whose 'text' field is a string, got str"),
    ],
)
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz"])
def test_bad_row_names_the_file_and_the_row(tmp_path: Path, name: str, row: str, told: str):
    path = store(tmp_path / name, rows("fine") + "\n" + row + "\n" + rows("fine"))
    with pytest.raises(ParedError, match=rf"{path}, row 3: {told}"):
        find_text(f"file:{path}")


@pytest.mark.parametrize(
    ("name", "content"),
    [("a.txt", ""), ("a.txt", " \n\n"), ("a.jsonl", "\n"), ("a.jsonl", '{"text": ""}\n'), ("a.txt.gz", "")],
)
def test_empty_text_is_refused(tmp_path: Path, name: str, content: str):
    path = store(tmp_path / name, content)
    with pytest.raises(ParedError, match=rf"text 'file:{path}' \({path}\) is empty"):
        find_text(f"file:{path}")


def test_missing_file_names_it(tmp_path: Path):
    with pytest.raises(ParedError, match=rf"text file {tmp_path}/no\.txt: No such file"):
        find_text(f"file:{tmp_path}/no.txt")


def test_folder_is_not_a_text(tmp_path: Path):
    folder = tmp_path / "words.txt"
    folder.mkdir()
    with pytest.raises(ParedError, match="Is a directory"):
        find_text(f"file:{folder}")


GZIP_HEADER = gzip.compress(b"", mtime=0)[:10]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("latin.txt", "naïve".encode("latin-1")),
        ("plain.txt.gz", b"not compressed at all"),
        ("short.txt.gz", gzip.compress(b"cut off in the middle" * 20, mtime=0)[:30]),
        ("garbage.txt.gz", GZIP_HEADER + b"\xff" * 40),
        ("flipped.txt.gz", gzip.compress(b"abc", mtime=0)[:-8] + b"\x00" * 8),
    ],
    ids=["not UTF-8", "not gzip", "truncated", "corrupt stream", "wrong checksum"],
)
def test_damaged_file_names_it(tmp_path: Path, name: str, content: bytes):
    """A corrupt stream once came out as a bare zlib.error."""
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ParedError, match=rf"text file {path}: "):
        find_text(f"file:{path}")


# Names


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("wikitxt2:train", "wikitext2:train"),
        ("wikitext2:tset", "wikitext2:test"),
        ("embeded", "embedded"),
        ("alpacca", "alpaca"),
        ("c4:trian", "c4:train"),
    ],
)
def test_unknown_text_suggests_the_nearest(name: str, nearest: str):
    with pytest.raises(ParedError, match=rf"unknown text '{name}'; did you mean '{nearest}'\? .*file:PATH"):
        find_text(name)


def test_unknown_part_of_the_embedded_text_suggests_the_nearest():
    with pytest.raises(ParedError, match="unknown text 'embedded:evl'; did you mean 'embedded:eval'"):
        find_text("embedded:evl")


def test_hub_text_without_the_datasets_library_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("PARED_DATA", raising=False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    for name in ("wikitext2:test", "owner/set[config]:train:text"):
        with pytest.raises(ParedError, match="is read by the package datasets; install it with: pip install datasets"):
            find_text(name)


# The embedded text


def test_embedded_halves_are_disjoint_and_cover_the_whole():
    from pydoc_data import topics

    seen, unseen = find_text("embedded:calibration"), find_text("embedded:eval")
    assert not set(seen.documents) & set(unseen.documents)
    assert sorted(seen.documents + unseen.documents) == sorted(topics.topics.values())
    share = len(seen.joined) / (len(seen.joined) + len(unseen.joined))
    assert 0.75 < share < 0.9


def test_embedded_is_calibrated_on_one_half_and_evaluated_on_the_other():
    assert find_text("embedded").documents == find_text("embedded:calibration").documents
    assert find_text("embedded", evaluation=True).documents == find_text("embedded:eval").documents
    assert find_text("embedded", evaluation=True).name == "embedded:eval"
    assert find_text("embedded:calibration", evaluation=True).documents == find_text("embedded").documents


def test_embedded_text_says_that_it_only_stands_in():
    assert find_text("embedded").stand_in
    assert find_text("embedded:eval").stand_in


def test_held_out_text_is_never_the_calibration_text():
    assert all(held_out(name) not in (name, None) for name in HELD_OUT)
    assert held_out("embedded") == "embedded:eval"
    assert held_out("wikitext2:train") == "wikitext2:test"
    assert held_out("file:mine.txt") == "file:mine.txt[80%:]"
    assert held_out("alpaca") is None
    assert {name for name in HELD_OUT.values() if not name.startswith(("embedded", "stdlib"))} <= CORPORA.keys()


# PARED_DATA


def test_wikitext_line_of_one_blank_is_the_empty_row():
    assert wikitext_rows(" \n = Title = \n \n First . \n Second . \n") == (
        "", " = Title = \n", "", " First . \n", " Second . \n"
    )  # fmt: skip


@pytest.mark.parametrize("split", ["test", "validation", "train"])
def test_wikitext_folder_gives_the_usual_perplexity_text(data: Path, split: str):
    file = {"test": "test", "validation": "valid", "train": "train_part"}[split]
    content = " \n = Title = \n \n First <unk> . \u2028still first \n Second . \n"
    path = store(data / f"lm/wikitext2_raw_{file}.txt", content)
    text = find_text(f"wikitext2:{split}")
    lines = content.split("\n")[:-1]
    assert text.joined == "\n\n".join("" if line == " " else line + "\n" for line in lines)
    assert text.joined == "\n\n = Title = \n\n\n\n\n First <unk> . \u2028still first \n\n\n Second . \n"
    assert text.origin == str(path)
    assert not text.stand_in


@pytest.mark.parametrize(
    ("name", "file"), [("c4:train", "lm/c4_truncated_1480.jsonl"), ("c4:validation", "lm/c4_demo_300.jsonl")]
)
def test_c4_folder_gives_its_documents(data: Path, name: str, file: str):
    store(data / file, rows("one", "two"))
    assert find_text(name).documents == ("one", "two")


def test_alpaca_folder_gives_prompts_with_their_answers(data: Path):
    tasks = [
        {"instruction": "Add.", "input": "1 and 2", "output": "3"},
        {"instruction": "Greet.", "input": "", "output": "Hello"},
    ]
    store(data / "instruct/alpaca_random_9k.jsonl.gz", "\n".join(map(json.dumps, tasks)))
    with_input, without = find_text("alpaca").documents
    assert with_input == (
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nAdd.\n\n### Input:\n1 and 2\n\n### Response:\n3"
    )
    assert without == (
        "Below is an instruction that describes a task. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nGreet.\n\n### Response:\nHello"
    )
    assert alpaca_text(tasks[1]) == without


@pytest.mark.parametrize("name", sorted(CORPORA))
def test_missing_file_in_pared_data_names_folder_and_file(data: Path, name: str):
    with pytest.raises(ParedError) as told:
        find_text(name)
    assert f"text {name!r}: PARED_DATA names {data}, which has no {CORPORA[name].file}" in str(told.value)


# Windows


def test_consecutive_windows_are_the_text_in_order():
    found = cut(numbers(50), TOKENIZER, 7, 4)
    assert found.tokens.dtype == torch.int64
    assert torch.equal(found.tokens, torch.arange(28).view(4, 7))


def test_none_takes_every_whole_window_and_drops_the_rest():
    assert torch.equal(cut(numbers(50), TOKENIZER, 7, None).tokens, torch.arange(49).view(7, 7))
    assert cut(numbers(49), TOKENIZER, 7, None).tokens.shape == (7, 7)
    assert cut(numbers(48), TOKENIZER, 7, None).tokens.shape == (6, 7)


def test_no_special_tokens_are_put_in():
    tokenizer = tiny_tokenizer(64)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="w1 $A w2", special_tokens=SPECIAL)
    assert tokenizer(words(3))["input_ids"] == [1, 0, 1, 2, 2]
    assert cut(numbers(20), tokenizer, 20, 1).tokens.tolist() == [list(range(20))]


def test_documents_are_tokenised_as_one_text():
    text = Text("two", (words(5), words(5, start=5)), "this test")
    assert torch.equal(cut(text, TOKENIZER, 10, 1).tokens, torch.arange(10).view(1, 10))


def test_random_offsets_are_reproducible_from_the_seed():
    text = Text("random", (" ".join(f"w{i * i % 64}" for i in range(500)),), "this test")
    one, again, other = (cut(text, TOKENIZER, 16, 12, "random-offset", seed) for seed in (3, 3, 4))
    assert torch.equal(one.tokens, again.tokens)
    assert one.digest == again.digest
    assert not torch.equal(one.tokens, other.tokens)
    assert one.digest != other.digest


def test_random_offsets_neither_read_nor_move_the_global_generator():
    torch.manual_seed(0)
    one = cut(numbers(300), TOKENIZER, 16, 5, "random-offset", 1)
    after = torch.rand(1)
    torch.manual_seed(0)
    assert torch.equal(torch.rand(1), after)
    torch.manual_seed(99)
    assert torch.equal(cut(numbers(300), TOKENIZER, 16, 5, "random-offset", 1).tokens, one.tokens)


def test_random_offset_windows_are_pieces_of_the_text_from_anywhere_in_it():
    found = cut(numbers(60), TOKENIZER, 8, 400, "random-offset")
    starts = found.tokens[:, 0]
    assert torch.equal(found.tokens, starts[:, None] + torch.arange(8))
    assert set(starts.tolist()) == set(range(60 - 8 + 1))  # first and last possible start included


def test_random_offset_of_a_text_of_one_window_is_that_window():
    found = cut(numbers(8), TOKENIZER, 8, 3, "random-offset")
    assert torch.equal(found.tokens, torch.arange(8).expand(3, 8))


@pytest.mark.parametrize("sampling", ["consecutive", "random-offset"])
def test_text_shorter_than_a_window_is_refused(sampling: str):
    with pytest.raises(ParedError, match="text 'numbers' has 9 tokens, fewer than one window of 10"):
        cut(numbers(9), TOKENIZER, 10, 1, sampling)


def test_fewer_windows_than_asked_is_a_warning(caplog: pytest.LogCaptureFixture):
    found = cut(numbers(50), TOKENIZER, 7, 100)
    assert found.tokens.shape == (7, 7)
    assert [record.getMessage() for record in caplog.records] == [
        "text 'numbers' has only 7 of the 100 windows of 7 tokens requested"
    ]
    assert caplog.records[0].levelname == "WARNING"


def test_enough_windows_is_no_warning(caplog: pytest.LogCaptureFixture):
    cut(numbers(50), TOKENIZER, 7, 7)
    cut(numbers(50), TOKENIZER, 7, None)
    cut(numbers(50), TOKENIZER, 7, 100, "random-offset")
    assert not caplog.records


def test_digest_is_the_sha256_of_little_endian_int64_tokens():
    found = cut(numbers(10), TOKENIZER, 5, 2)
    raw = b"".join(token.to_bytes(8, "little") for token in range(10))
    assert found.digest == hashlib.sha256(raw).hexdigest()
    assert digest_of(torch.arange(20)[::2]) == digest_of(torch.arange(0, 20, 2))  # strided or not


def test_windows_say_what_they_are():
    found = cut(numbers(50), TOKENIZER, 7, 4)
    whole = hashlib.sha256(numbers(50).joined.encode()).hexdigest()
    assert found.describe() == {
        "text": "numbers", "origin": "this test", "stand_in": False, "windows": 4, "length": 7, "digest": found.digest,
        "whole": whole, "characters": [[0, len(words(28))]],
    }  # fmt: skip


def test_embedded_windows_are_marked_as_a_stand_in():
    assert cut(find_text("embedded:eval"), TOKENIZER, 16, 2).describe()["stand_in"] is True


@pytest.mark.parametrize("name", ["table.csv", "rows.json", "words", "archive.zip", "rows.json.gz"])
def test_a_file_of_another_kind_is_refused_and_not_read_as_plain_text(tmp_path: Path, name: str):
    with pytest.raises(ParedError, match=r"expected \.txt or \.jsonl"):
        find_text(f"file:{store(tmp_path / name, 'a b c')}")


def test_a_byte_order_mark_is_not_part_of_the_text(tmp_path: Path):
    path = tmp_path / "a.txt"
    path.write_text("words", encoding="utf-8-sig")
    assert find_text(f"file:{path}").joined == "words"
