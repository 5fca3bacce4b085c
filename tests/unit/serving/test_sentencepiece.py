"""SentencePiece vocabularies in GGUF files: scores that join what the merges of the tokenizer do."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from gguf import TokenType
from tokenizers import normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import pared
from pared import ParedError
from pared.models.gguf import header_of
from pared.serving.gguf.sentencepiece import BLANK, BYTES, scores_of
from pared.serving.gguf.vocabulary import LOWEST, Vocabulary, vocabulary_of
from unit.serving.gguf_models import LETTERS, PIECES, SENTENCEPIECE_ROWS, model_of, sentencepiece, ways_to_make

KNOWN = {piece: number for number, piece in enumerate([*sorted(BYTES), *LETTERS, *PIECES])}
MERGES = [way for piece in PIECES for way in ways_to_make(piece)]


def by_scores(text: str, scores: dict[str, float]) -> list[str]:
    """Join as llama.cpp does: the neighbours of the highest score, of several the first."""
    symbols = list(text)
    while True:
        pairs = [(scores[a + b], -place) for place, (a, b) in enumerate(zip(symbols, symbols[1:])) if a + b in KNOWN]
        if not pairs:
            return symbols
        place = -max(pairs)[1]
        symbols[place : place + 2] = [symbols[place] + symbols[place + 1]]


def test_scores_join_what_the_merges_of_the_tokenizer_do() -> None:
    scores, own, draw = scores_of(KNOWN, MERGES, (), "tiny"), sentencepiece(), random.Random(0)
    for _ in range(200):
        text = "".join(draw.choices([*LETTERS], k=draw.randint(1, 12)))
        assert own.tokenize(text.replace(BLANK, " ")) == by_scores(text, scores), text


def test_merges_that_no_scores_give_are_refused() -> None:
    with pytest.raises(ParedError, match=r"has no token for 1 of the 256 bytes \(<0x41>\)"):
        scores_of({piece: 0 for piece in KNOWN if piece != "<0x41>"}, MERGES, (), "tiny")
    with pytest.raises(ParedError, match="joins 't' and 'a', which make no token"):
        scores_of(KNOWN, [*MERGES, "t a"], (), "tiny")
    first = ways_to_make("the")[0]
    apart = [*(way for way in MERGES if way != first), first]
    with pytest.raises(ParedError, match="later than others that make 'the'"):
        scores_of(KNOWN, apart, (), "tiny")
    with pytest.raises(ParedError, match="does not join 'th' and 'e', and llama.cpp would, as 'the' is a token"):
        scores_of(KNOWN, [way for way in MERGES if way != first], (), "tiny")


def test_what_is_added_is_no_part_of_a_merge() -> None:
    without = [way for way in MERGES if "".join(way) != "th" and "th" not in way]
    with pytest.raises(ParedError, match="does not join"):
        scores_of(KNOWN, without, (), "tiny")
    assert "th" not in scores_of(KNOWN, without, ("th",), "tiny")


def test_a_file_holds_scores_types_and_whether_a_blank_comes_first(tmp_path: Path) -> None:
    model_of("gemma3", vocab_size=SENTENCEPIECE_ROWS).save_pretrained(tmp_path / "dense")
    own = sentencepiece()
    own.save_pretrained(tmp_path / "dense")
    pared.export(tmp_path / "dense", tmp_path / "made.gguf", to="gguf")
    fields = {key.removeprefix("tokenizer.ggml."): value for key, value in header_of(tmp_path / "made.gguf").fields.items()}
    assert (fields["model"], fields["pre"], fields["add_space_prefix"]) == ("llama", "default", False)
    assert (fields["add_bos_token"], fields["add_eos_token"]) == (True, False)
    assert "merges" not in fields
    vocabulary, scores, types = own.get_vocab(), fields["scores"], fields["token_type"]
    assert [scores[vocabulary[piece]] for piece in PIECES] == [-float(place) for place in range(len(PIECES))]
    assert scores[vocabulary["<0x00>"]] == scores[-1] == LOWEST
    kinds = {"<bos>": TokenType.CONTROL, "<unk>": TokenType.UNKNOWN, "<0x41>": TokenType.BYTE, "the": TokenType.NORMAL}
    assert {piece: types[vocabulary[piece]] for piece in kinds} == kinds
    assert types[-1] == TokenType.UNUSED
    again = pared.load_tokenizer(tmp_path / "made.gguf")
    for text in ("the man 12", "  the\n\nthan \u00e9\u4f60", "an anthe"):
        assert again(text)["input_ids"] == own(text)["input_ids"], text


def metaspace(scheme: str, split: bool = False) -> Callable[[Any], None]:
    def change(core: Any) -> None:
        core.normalizer = None
        core.pre_tokenizer = pre_tokenizers.Metaspace(replacement=BLANK, prepend_scheme=scheme, split=split)

    return change


def prepended(core: Any) -> None:
    core.normalizer = normalizers.Sequence([normalizers.Prepend(BLANK), normalizers.Replace(" ", BLANK)])
    core.pre_tokenizer = None


def made(change: Callable[[Any], None]) -> Vocabulary:
    own: PreTrainedTokenizerFast = sentencepiece()
    change(own.backend_tokenizer)
    return vocabulary_of(own, SENTENCEPIECE_ROWS, "tiny")


@pytest.mark.parametrize(
    ("change", "adds"),
    [(prepended, True), (metaspace("always"), True), (metaspace("never"), False), (lambda _: None, False)],
)
def test_a_blank_before_a_text_is_in_the_file(change: Callable[[Any], None], adds: bool) -> None:
    assert made(change).adds_blank is adds


def test_a_blank_before_the_first_word_alone_is_told_of(caplog: pytest.LogCaptureFixture) -> None:
    assert made(metaspace("first")).adds_blank
    assert "llama.cpp behind special tokens too" in caplog.text


def lowered(core: Any) -> None:
    core.normalizer = normalizers.Lowercase()


@pytest.mark.parametrize("change", [lowered, metaspace("always", split=True)])
def test_text_that_is_prepared_otherwise_is_refused(change: Callable[[Any], None]) -> None:
    with pytest.raises(ParedError, match=r"SentencePiece tokenizers that replace blanks by .* cut text nowhere"):
        made(change)


def test_gemma_is_refused_where_llama_cpp_has_other_numbers() -> None:
    from pared.serving.gguf.description import described

    assert described(model_of("gemma3"), "tiny").fields["attention.sliding_window"] == 16
    for fields, message in (
        ({"query_pre_attn_scalar": 64}, "query_pre_attn_scalar is 64, and llama.cpp has 8 there"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping is 30.0"),
        ({"layer_types": ["full_attention"] * 7}, "layer_types is"),
    ):
        with pytest.raises(ParedError, match=message):
            described(model_of("gemma3", **fields), "tiny")


def test_norms_of_gemma_are_written_with_the_one_that_transformers_adds() -> None:
    from pared.serving.gguf.description import described

    model = model_of("gemma3")
    tensors = {tensor.name: tensor for tensor in described(model, "tiny").tensors}
    for stored, own in (("blk.1.post_ffw_norm", "post_feedforward_layernorm"), ("blk.1.attn_q_norm", "self_attn.q_norm")):
        weight = model.get_submodule(f"model.layers.1.{own}").weight
        assert (tensors[f"{stored}.weight"].values() == weight + 1).all()
