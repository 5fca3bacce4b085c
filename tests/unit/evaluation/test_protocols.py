"""Perplexity as papers measure it: how texts are cut, what counts, and what could not be kept to."""

import itertools
import math
from pathlib import Path

import pytest
import torch
from transformers import PretrainedConfig
from typer.testing import CliRunner

from pared import ParedError
from pared.cli.commands import app
from pared.data.texts import Text, find_text
from pared.data.windows import cut
from pared.evaluation import perplexity
from pared.evaluation.protocols import PROTOCOLS, Protocol, cut_by, protocol_of
from unit.evaluation.test_perplexity import TOKENIZER, VOCAB, counting

CONFIG = PretrainedConfig(vocab_size=VOCAB, max_position_embeddings=4096)


def text_of(*documents: str, name: str = "wikitext2:test") -> Text:
    return Text(name, documents, "this test")


def words(first: int, count: int) -> str:
    return " ".join(f"w{3 + (first + index) % 60}" for index in range(count))


def short(**more: object) -> Protocol:
    return Protocol("short", "nobody", length=4, **more)  # type: ignore[arg-type]


def test_windows_do_not_overlap_and_the_rest_is_left_out() -> None:
    found = cut_by(short(), text_of(words(0, 10)), TOKENIZER, CONFIG)
    assert found.windows.tokens.shape == (2, 4)
    assert found.windows.mask is None
    assert found.deviations == ()


def test_a_short_last_window_counts_as_much_as_the_others() -> None:
    found = cut_by(short(averaging="window", last=True), text_of(words(0, 10)), TOKENIZER, CONFIG)
    assert found.windows.mask is not None
    assert found.windows.mask.sum(dim=1).tolist() == [4, 4, 2]
    model = counting(0.5)
    tokens = found.windows.tokens.tolist()
    result = perplexity(model, TOKENIZER, found.windows, averaging=found.averaging)
    assert [len(row) for row in model.seen] == [4, 4, 2]
    by_window = []
    for row, length in zip(tokens, (4, 4, 2), strict=True):
        steps = list(itertools.pairwise(row[:length]))
        nats = [-math.log(0.5 if after == (before + 1) % VOCAB else 0.5 / 63) for before, after in steps]
        by_window.append(sum(nats) / len(nats))
    assert result.value == pytest.approx(math.exp(sum(by_window) / 3), rel=1e-6)
    assert result.predicted == 7


def test_means_over_tokens_and_windows_are_one_where_windows_are_equally_long() -> None:
    windows = cut_by(short(), text_of(words(5, 20)), TOKENIZER, CONFIG).windows
    values = [perplexity(counting(0.3), TOKENIZER, windows, averaging=one).value for one in ("token", "window")]  # type: ignore[arg-type]
    assert values[0] == pytest.approx(values[1], rel=1e-6)


def test_documents_are_joined_and_counted_as_the_protocol_says() -> None:
    documents = [words(index, 3) for index in range(6)]
    found = cut_by(short(joins={"c4": " "}, documents={"c4": 4}, windows={"c4": 2}),
                   text_of(*documents, name="c4:validation"), TOKENIZER, CONFIG)  # fmt: skip
    expected = TOKENIZER(" ".join(documents[:4]))["input_ids"]
    assert found.windows.tokens.flatten().tolist() == expected[:8]
    assert found.deviations == ()


def test_what_could_not_be_kept_to_is_told() -> None:
    config = PretrainedConfig(vocab_size=VOCAB, max_position_embeddings=3)
    found = cut_by(short(documents={"c4": 9}), text_of(words(0, 9), name="c4:validation"), TOKENIZER, config)
    assert found.windows.tokens.shape[1] == 3
    assert found.deviations == (
        "1 documents of this test in place of 9",
        "windows of 3 tokens, the most this model takes, in place of 4",
    )
    found = cut_by(short(), text_of(words(0, 9), name="file:mine.txt"), TOKENIZER, CONFIG)
    assert found.deviations == ("it says nothing of the text 'file:mine.txt', which is joined by blank lines",)


def test_another_split_and_fewer_windows_than_a_paper_takes_are_told() -> None:
    c4 = short(windows={"c4": 3}, documents={"c4": 1})
    (split,) = cut_by(c4, text_of(words(0, 12), name="c4:train"), TOKENIZER, CONFIG).deviations
    assert split == "'c4:train' in place of c4:validation"
    (fewer,) = cut_by(c4, text_of(words(0, 11), name="c4:validation"), TOKENIZER, CONFIG).deviations
    assert fewer == "2 windows, which is all there are, in place of 3"


def test_sentences_of_the_penn_treebank_are_joined_as_each_paper_joins_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "lm").mkdir()
    lines = [words(index, 400) for index in range(6)]
    (tmp_path / "lm" / "ptb.test.txt").write_text("".join(f" {line} \n" for line in lines), encoding="utf-8")
    monkeypatch.setenv("PARED_DATA", str(tmp_path))
    text = find_text("ptb:test")
    assert text.documents == tuple(lines)
    for name, join in (("svd-llm", "\n\n"), ("gptq", " ")):
        found = cut_by(protocol_of(name), text, TOKENIZER, PretrainedConfig(vocab_size=VOCAB))
        assert found.windows.tokens.flatten().tolist() == TOKENIZER(join.join(lines))["input_ids"][:2048]
        assert found.deviations == ()
    (told,) = cut_by(protocol_of("wanda"), text, TOKENIZER, PretrainedConfig(vocab_size=VOCAB)).deviations
    assert told.startswith("it says nothing of the text 'ptb:test'")
    with pytest.raises(ParedError, match=r"which has no lm/ptb\.train\.txt"):
        find_text("ptb:train")


def test_unknown_protocols_and_short_texts_are_refused() -> None:
    assert set(PROTOCOLS) == {"svd-llm", "basis-sharing", "wanda", "gptq"}
    with pytest.raises(ParedError, match="unknown protocol 'wandda'; did you mean 'wanda'"):
        protocol_of("wandda")
    with pytest.raises(ParedError, match="fewer than one window of 2048 of the protocol svd-llm"):
        cut_by(protocol_of("svd-llm"), text_of(words(0, 9)), TOKENIZER, CONFIG)


def test_overlapping_windows_count_every_token_once() -> None:
    text = text_of(words(0, 30))
    windows = cut(text, TOKENIZER, 8, None, stride=3)
    ids = torch.tensor(TOKENIZER(text.joined, add_special_tokens=False)["input_ids"])
    assert windows.tokens.shape == ((len(ids) - 8) // 3 + 1, 8)
    assert torch.equal(windows.tokens[2], ids[6:14])
    found = perplexity(counting(0.5), TOKENIZER, windows, fresh=3)
    assert found.predicted == 7 + 3 * (len(windows.tokens) - 1)
    end = 6 + 3 * (len(windows.tokens) - 1) + 2
    whole = perplexity(counting(0.5), TOKENIZER, cut(text_of(words(0, 30)), TOKENIZER, end, 1))
    assert found.nats == pytest.approx(whole.nats, rel=1e-6)  # of a bigram, which no context helps


def test_a_stride_longer_than_a_window_is_refused() -> None:
    for stride in (0, 9):
        with pytest.raises(ParedError, match="expected 1 to 8"):
            cut(text_of(words(0, 30)), TOKENIZER, 8, None, stride=stride)


def test_the_command_measures_by_protocol_and_tells_deviations(tmp_path_factory: pytest.TempPathFactory) -> None:
    from tiny_models import TINY_MODELS

    place = tmp_path_factory.mktemp("protocol")
    TINY_MODELS["llama"]().save_pretrained(place / "m")
    TOKENIZER.save_pretrained(place / "m")
    (place / "t.txt").write_text(words(0, 300))
    command = ["eval", str(place / "m"), "--perplexity", f"file:{place}/t.txt", "--protocol", "wanda"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    assert "windows of 128 tokens, the most this model takes, in place of 2048" in result.output.replace("\n", " ")
    assert "as wanda measures (locuslab/wanda)" in result.output
