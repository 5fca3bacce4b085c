"""``pared export --to gguf``: one file that llama.cpp reads, which holds the numbers of the model."""

import errno
import logging
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader, LlamaFileType, TokenType
from tokenizers import normalizers, processors
from transformers import PreTrainedModel, PreTrainedTokenizerFast

import pared
import pared.entrypoints.export_gguf
import pared.models.gguf
import pared.serving.gguf.file
from pared import ParedError
from pared.checkpoint.save import mark
from pared.cli.export import PRINTED
from pared.entrypoints.checks import FORMS
from pared.io.digests import file_digest
from pared.models.gguf import header_of
from pared.models.gguf_header import LONGEST
from pared.models.gguf_weights import dequantised_tensor
from pared.models.pre_tokenizers import PRE_TOKENIZERS
from pared.modules import SparseLinear
from pared.modules.narrow import narrowed
from pared.serving.gguf.description import described
from pared.serving.gguf.file import compare, write_gguf
from pared.serving.gguf.types import TYPES
from pared.serving.gguf.vocabulary import Vocabulary, vocabulary_of
from unit.cli.test_commands import left_over, refused
from unit.cli.test_commands import pared as command
from unit.serving.gguf_models import (
    BEGIN,
    MERGES,
    ROWS,
    TEMPLATE,
    biased_model,
    changed_model,
    cut,
    model_of,
    narrowed_model,
    saved,
    tokenizer_of,
)

TEXTS = ["the than 1234 an\n\n  the", "It's <s>caf\u00e9</s><tool> 12345!", " the\tan", ""]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PARED_CACHE", str(tmp_path / "cache"))


def numbers(file: Path, name: str) -> torch.Tensor:
    return torch.from_numpy(dequantised_tensor(file, header_of(file).tensors[name]))


def halves(rows: torch.Tensor, head: int = 8) -> torch.Tensor:
    """Put neighbouring rows of queries or keys back into halves, as transformers has them."""
    return rows.reshape(-1, head // 2, 2, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)


# A file holds the model.


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_our_reader_reads_every_tensor_that_was_written(tmp_path: Path, family: str) -> None:
    folder = saved(tmp_path / "dense", family)
    written = pared.export(folder, tmp_path / "made.gguf", to="gguf")
    assert written.self_check == 0
    assert written.bytes_on_disk == (tmp_path / "made.gguf").stat().st_size
    model, again = pared.load(folder), pared.load(tmp_path / "made.gguf")
    found = again.state_dict()
    assert found.keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(found[name], tensor), name
    assert_answers_alike(model, tmp_path / "made.gguf")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_what_is_stored_is_kept_unless_another_type_is_asked_for(tmp_path: Path, dtype: str) -> None:
    model_of("llama").to(getattr(torch, dtype)).save_pretrained(tmp_path / "dense")
    tokenizer_of().save_pretrained(tmp_path / "dense")
    assert pared.export(tmp_path / "dense", tmp_path / "made.gguf", to="gguf").self_check == 0
    assert header_of(tmp_path / "made.gguf").dtype == dtype
    assert pared.load(tmp_path / "made.gguf").dtype == getattr(torch, dtype)


@pytest.mark.parametrize(("kind", "most"), [("f32", 0), ("f16", 2**-11), ("bf16", 2**-8), ("q8_0", 0.5 / 127 + 1e-3)])
def test_types_round_as_little_as_they_can(tmp_path: Path, kind: str, most: float) -> None:
    folder = saved(tmp_path / "dense", "llama", intermediate_size=64)
    written = pared.export(folder, tmp_path / "made.gguf", to="gguf", quantize=kind)
    assert written.self_check <= most
    state = pared.load(folder).state_dict()
    gate = state["model.layers.1.mlp.gate_proj.weight"]
    off = (numbers(tmp_path / "made.gguf", "blk.1.ffn_gate.weight") - gate).abs().max()
    assert off <= most * gate.abs().max()
    assert (off > 0) == (most > 0)
    assert torch.equal(numbers(tmp_path / "made.gguf", "output_norm.weight"), state["model.norm.weight"])


def test_rows_that_q8_0_cannot_divide_are_float16_and_that_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "pared"):
        pared.export(saved(tmp_path / "dense", "llama"), tmp_path / "made.gguf", to="gguf", quantize="q8_0")
    assert "3 matrices are stored as f16" in caplog.text
    assert "blk.0.ffn_down.weight: 48" in caplog.text
    kinds = {name: tensor.kind for name, tensor in header_of(tmp_path / "made.gguf").tensors.items()}
    assert (kinds["blk.0.ffn_down.weight"], kinds["blk.0.ffn_up.weight"], kinds["output_norm.weight"]) == (1, 8, 0)


def test_scaled_positions_become_factors(tmp_path: Path) -> None:
    scaled = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
              "high_freq_factor": 4.0, "original_max_position_embeddings": 32}  # fmt: skip
    model = model_of("llama", rope_parameters=scaled)
    (factors,) = (one for one in described(model, "tiny").tensors if one.name == "rope_freqs.weight")
    plain = 10000.0 ** -(torch.arange(0, 8, 2) / 8)
    torch.testing.assert_close(plain / factors.values(), model.model.rotary_emb.inv_freq)
    assert len(set(factors.values().tolist())) > 1
    qwen = described(model_of("qwen2", rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}), "q")
    assert qwen.architecture == "deci"  # as llama.cpp's qwen2 takes no factors
    with pytest.raises(ParedError, match=r"qwen3 takes no scaled positions"):
        described(model_of("qwen3", rope_parameters=scaled), "tiny")
    with pytest.raises(ParedError, match=r"rope_type 'yarn'"):
        described(model_of("llama", rope_parameters={"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}), "tiny")


# Layers that lost channels or heads.


WIDTHS, HEADS = [48, 16, 40], [1, 2, 2]


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_widths_by_layer_are_deci_with_numbers_for_every_layer(tmp_path: Path, family: str) -> None:
    small, file = saved(tmp_path / "small", narrowed_model(family, WIDTHS, HEADS)), tmp_path / "small.gguf"
    assert pared.export(small, file, to="gguf").self_check == 0
    fields = header_of(file).fields
    assert fields["general.architecture"] == "deci"
    assert fields["deci.feed_forward_length"] == WIDTHS
    assert fields["deci.attention.head_count_kv"] == HEADS
    assert fields["deci.attention.head_count"] == [2 * heads for heads in HEADS]
    assert fields["deci.attention.key_length"] == fields["deci.attention.value_length"] == 8
    assert fields["deci.rope.dimension_count"] == 8
    for number, layer in enumerate(pared.load(small).model.layers):
        for short, name in (
            ("attn_v", "self_attn.v_proj"),
            ("attn_output", "self_attn.o_proj"),
            ("ffn_down", "mlp.down_proj"),
        ):
            assert torch.equal(numbers(file, f"blk.{number}.{short}.weight"), layer.get_submodule(name).weight), name
        for short in "qk":
            own = layer.get_submodule(f"self_attn.{short}_proj")
            assert torch.equal(halves(numbers(file, f"blk.{number}.attn_{short}.weight")), own.weight)
            if own.bias is not None:
                assert torch.equal(halves(numbers(file, f"blk.{number}.attn_{short}.bias")), own.bias)


def test_a_bias_that_the_architecture_lacks_is_in_the_file(tmp_path: Path) -> None:
    model, file = biased_model(), tmp_path / "small.gguf"
    pared.export(saved(tmp_path / "small", model), file, to="gguf")
    for number, layer in enumerate(model.model.layers):
        assert torch.equal(numbers(file, f"blk.{number}.ffn_down.bias"), layer.mlp.down_proj.bias)
        assert torch.equal(numbers(file, f"blk.{number}.attn_output.bias"), layer.self_attn.o_proj.bias)


def test_one_width_everywhere_stays_the_architecture_it_is(tmp_path: Path) -> None:
    small, file = saved(tmp_path / "small", narrowed_model("llama", [24] * 3)), tmp_path / "small.gguf"
    pared.export(small, file, to="gguf")
    fields = header_of(file).fields
    assert (fields["general.architecture"], fields["llama.feed_forward_length"]) == ("llama", 24)
    assert pared.load(file).config.intermediate_size == pared.load(small).config.intermediate_size == 24


def test_fewer_heads_everywhere_are_deci_where_the_family_wants_all_of_them() -> None:
    few = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
    told = {family: described(model_of(family, **few), "tiny") for family in ("llama", "qwen2")}
    assert {family: one.architecture for family, one in told.items()} == {"llama": "llama", "qwen2": "deci"}
    assert told["llama"].fields["attention.key_length"] == 8


@pytest.mark.parametrize("kind", ["low_rank", "sparse"])
def test_what_has_no_form_is_written_dense_and_the_size_not_gained_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    small, file = saved(tmp_path / "small", changed_model(kind)), tmp_path / "small.gguf"
    with caplog.at_level(logging.WARNING, "pared"):
        pared.export(small, file, to="gguf")
    model, dense = pared.load(small), model_of("llama").num_parameters()
    stored = sum(parameter.numel() for parameter in model.parameters())
    stored -= sum(int((~one.mask).sum()) for one in model.modules() if isinstance(one, SparseLinear))
    (told,) = (one.getMessage() for one in caplog.records if "no form" in one.getMessage())
    assert f"no form for 21 {kind} layers: they are written dense" in told
    assert told.endswith(f"the file holds {dense:,} numbers in place of {stored:,}")
    assert stored < dense
    assert_answers_alike(model, file)


def test_widths_by_layer_of_a_family_that_has_one_width_are_widened_and_that_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    small, file = saved(tmp_path / "small", narrowed_model("qwen3", WIDTHS)), tmp_path / "small.gguf"
    with caplog.at_level(logging.WARNING, "pared"):
        pared.export(small, file, to="gguf")
    assert "no form for 6 narrow layers: they are written dense" in caplog.text
    assert header_of(file).fields["qwen3.feed_forward_length"] == 48
    assert_answers_alike(pared.load(small), file)


@pytest.mark.parametrize(("family", "architecture"), [("llama", "llama"), ("qwen2", "deci"), ("qwen3", None)])
def test_biases_that_a_family_has_not_are_written_where_llama_cpp_reads_them(
    tmp_path: Path, family: str, architecture: str | None
) -> None:
    """FLAP gives layers that lost inputs a bias of what these were on the mean."""
    model, file = model_of(family), tmp_path / "small.gguf"
    for layer in model.model.layers:
        cut(layer.mlp, ("gate_proj", "up_proj"), None, 24)
        old = layer.mlp.down_proj
        layer.mlp.down_proj = narrowed(old, old.weight[:, :24], torch.randn(old.out_features))
    mark(model)
    small = saved(tmp_path / "small", model)
    if architecture is None:
        with pytest.raises(ParedError, match=r"down_proj has a bias, which Qwen3ForCausalLM has no place for"):
            pared.export(small, file, to="gguf")
        return
    assert pared.export(small, file, to="gguf").self_check == 0
    assert header_of(file).fields["general.architecture"] == architecture
    bias = pared.load(small).model.layers[1].mlp.down_proj.bias
    assert torch.equal(numbers(file, "blk.1.ffn_down.bias"), bias)


def assert_answers_alike(model: PreTrainedModel, file: Path) -> None:
    tokens = torch.randint(0, 260, (2, 12), generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(pared.load(file)(tokens).logits, model(tokens).logits, atol=1e-4, rtol=1e-4)


# The tokenizer.


@pytest.mark.parametrize("pre", PRE_TOKENIZERS)
def test_the_way_of_cutting_text_is_known_by_what_it_does(pre: str) -> None:
    assert vocabulary_of(tokenizer_of(pre), ROWS, "tiny").pre == pre


def test_tokens_merges_special_tokens_and_chat_template_are_in_the_file(tmp_path: Path) -> None:
    folder = saved(tmp_path / "dense", "llama")
    tokenizer_of(begins=True).save_pretrained(folder)
    pared.export(folder, tmp_path / "made.gguf", to="gguf")
    reader = GGUFReader(tmp_path / "made.gguf")
    read = {name.removeprefix("tokenizer."): field.contents() for name, field in reader.fields.items()}
    own, types = tokenizer_of().get_vocab(), read["ggml.token_type"]
    assert all(read["ggml.tokens"][number] == token for token, number in own.items())
    assert read["ggml.tokens"][len(own) :] == [f"[PAD{number}]" for number in range(len(own), ROWS)]
    assert types[BEGIN : BEGIN + 2] == [TokenType.CONTROL] * 2
    assert (types[BEGIN + 2], types[0], types[-1]) == (TokenType.USER_DEFINED, TokenType.NORMAL, TokenType.UNUSED)
    assert read["ggml.merges"] == [" ".join(pair) for pair in MERGES]
    assert (read["ggml.bos_token_id"], read["ggml.eos_token_id"], read["ggml.padding_token_id"]) == (
        BEGIN, BEGIN + 1, BEGIN + 1)  # fmt: skip
    assert (read["ggml.add_bos_token"], read["ggml.add_eos_token"]) == (True, False)
    assert read["chat_template"] == TEMPLATE
    assert read["ggml.pre"] == "smollm"


@pytest.mark.parametrize("pre", PRE_TOKENIZERS)
def test_the_tokenizer_read_back_gives_the_same_numbers(tmp_path: Path, pre: str) -> None:
    """Regression: transformers cuts the text of every file as GPT-2 does, and Llama 3 has other numbers then."""
    folder, own = saved(tmp_path / "dense", "llama"), tokenizer_of(pre)
    own.save_pretrained(folder)
    pared.export(folder, tmp_path / "made.gguf", to="gguf")
    again = pared.load_tokenizer(tmp_path / "made.gguf")
    for text in TEXTS:
        assert again(text)["input_ids"] == own(text)["input_ids"], text
    assert again.chat_template == own.chat_template


def test_a_twin_of_an_older_converter_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Regression: twins that were made before text was cut as the file says kept the tokens of GPT-2 in the cache."""
    folder, file, text = saved(tmp_path / "dense", "llama"), tmp_path / "made.gguf", "the 1234"
    pared.export(folder, file, to="gguf")
    with monkeypatch.context() as older:
        older.setattr(pared.models.gguf, "CONVERTER", pared.models.gguf.CONVERTER - 1)
        older.setattr(pared.models.gguf, "cut_as", lambda *_: None)
        stale = pared.load_tokenizer(file)(text)["input_ids"]
    (old,) = (tmp_path / "cache" / "models").iterdir()
    old.rename(old.with_name(f"made-{file_digest(file)[:16]}"))  # as it was named before there were versions
    own = tokenizer_of()(text)["input_ids"]
    assert stale != own
    assert pared.load_tokenizer(file)(text)["input_ids"] == own


def test_ways_of_cutting_text_differ_where_they_should() -> None:
    cut = {pre: tokenizer_of(pre).tokenize("the 1234\n\n the'S") for pre in PRE_TOKENIZERS}
    assert len({tuple(one) for one in cut.values()}) == len(PRE_TOKENIZERS), cut


def test_a_tokenizer_that_llama_cpp_would_read_otherwise_is_refused(tmp_path: Path) -> None:
    from tiny_tokenizer import tiny_tokenizer

    with pytest.raises(ParedError, match=r"byte-level BPE.*smollm.*its tokenizer is WordLevel"):
        vocabulary_of(tiny_tokenizer(), ROWS, "tiny")
    lower = tokenizer_of()
    lower.backend_tokenizer.normalizer = normalizers.Lowercase()
    with pytest.raises(ParedError, match="byte-level BPE"):
        vocabulary_of(lower, ROWS, "tiny")
    with pytest.raises(ParedError, match=r"number 270, its embeddings 200 rows; resize"):
        vocabulary_of(tokenizer_of(), 200, "tiny")


AROUND = {"<s> $A": (True, False), "$A </s>": (False, True), "<s> $A </s>": (True, True), "$A": (False, False)}


@pytest.mark.parametrize("single", AROUND)
def test_what_a_tokenizer_puts_around_a_text_is_in_the_file(single: str) -> None:
    made = vocabulary_of(around(single), ROWS, "tiny")
    assert (made.adds_bos, made.adds_eos) == AROUND[single]


@pytest.mark.parametrize("single", ["<tool> $A", "<s> <tool> $A", "$A <tool>", "</s> $A", "<s> <s> $A"])
def test_another_token_than_bos_and_eos_around_a_text_is_not_dropped_without_a_word(single: str) -> None:
    """Regression: the file said that nothing comes before a text, and llama.cpp got other tokens."""
    with pytest.raises(ParedError, match=r"tokenizer makes \[.*\] of 'a'.* say only that bos \(<s>\)"):
        vocabulary_of(around(single), ROWS, "tiny")


def around(single: str) -> PreTrainedTokenizerFast:
    """Return the tokenizer with other tokens around a text."""
    own = tokenizer_of()
    known = [(token, BEGIN + place) for place, token in enumerate(("<s>", "</s>", "<tool>"))]
    own.backend_tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=known)
    return own


# What is refused, and what is left then.


def test_what_llama_cpp_computes_otherwise_is_refused_by_the_field(tmp_path: Path) -> None:
    with pytest.raises(ParedError, match=r"sees 16 tokens \(sliding_window\)"):
        described(model_of("mistral", sliding_window=16), "tiny")
    with pytest.raises(ParedError, match=r"hidden_act is 'gelu'"):
        described(model_of("llama", hidden_act="gelu"), "tiny")
    with pytest.raises(ParedError, match=r"qwen3 reads no blk\.0\.attn_output\.bias"):
        described(model_of("qwen3", attention_bias=True), "tiny")
    assert described(model_of("llama", attention_bias=True, mlp_bias=True), "tiny").architecture == "llama"


def test_every_form_is_printed_and_every_type_is_one_of_the_gguf_package() -> None:
    """Regression: forms and types stood in two places, which could differ."""
    assert PRINTED.keys() == set(FORMS)
    for name, one in TYPES.items():
        assert (GGMLQuantizationType[one.kind].name.lower(), LlamaFileType[one.file_type].name.lower()) == (
            name, {"f32": "all_f32"}.get(name, f"mostly_{name}"))  # fmt: skip


def test_a_family_that_is_not_covered_is_refused_before_a_weight_is_read(tmp_path: Path) -> None:
    from tiny_models import TINY_MODELS

    TINY_MODELS["gpt2"]().save_pretrained(tmp_path / "dense")
    (tmp_path / "dense" / "model.safetensors").write_bytes(b"")
    out = tmp_path / "made.gguf"
    refused(command("export", tmp_path / "dense", "--to", "gguf", "--out", out),
            "GPT2LMHeadModel", *CLASSES, "convert_hf_to_gguf.py")  # fmt: skip
    assert not out.exists()


CLASSES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")


def test_options_that_make_no_file_are_refused_by_what_to_do(tmp_path: Path) -> None:
    folder, out = saved(tmp_path / "dense", "llama"), tmp_path / "made.gguf"
    gguf = ("export", folder, "--to", "gguf", "--out")
    refused(command(*gguf, out, "--quantize", "q4_k_m"), "llama-quantize", "made.gguf", "Q4_K_M", "--quantize f16")
    refused(command(*gguf, out, "--quantize", "q9"), "q9", "q8_0")
    refused(command(*gguf, out, "--dtype", "float32"), "--dtype", "--quantize")
    refused(command(*gguf, tmp_path / "made"), "ends with .gguf")
    refused(command("export", folder, "--out", tmp_path / "new", "--quantize", "f16"), "--quantize", "--to gguf")
    with pytest.raises(ParedError, match="unknown form 'ggml'; did you mean 'gguf'"):
        pared.export(folder, out, to="ggml")
    assert left_over(tmp_path) == ["dense"]


def test_a_file_that_is_there_stays_unless_it_may_be_replaced_and_is_one(tmp_path: Path) -> None:
    folder, out = saved(tmp_path / "dense", "llama"), tmp_path / "made.gguf"
    out.write_bytes(b"a diary")
    refused(command("export", folder, "--to", "gguf", "--out", out), "is there already", "--overwrite")
    refused(command("export", folder, "--to", "gguf", "--out", out, "--overwrite"), "is no .gguf file")
    assert out.read_bytes() == b"a diary"
    out.unlink()
    code, told, err = command("export", folder, "--to", "gguf", "--out", out)
    assert code == 0, err
    assert "every number compared" in told
    assert str(out) in told
    before = out.stat().st_ino
    assert command("export", folder, "--to", "gguf", "--out", out, "--overwrite")[0] == 0
    assert out.stat().st_ino != before
    refused(command("export", out, "--to", "gguf", "--out", out, "--overwrite"), "which is read")
    refused(command("export", folder, "--to", "gguf", "--out", folder / "a.gguf"), "lies inside")


def test_nothing_is_left_where_the_disk_fills_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, out = saved(tmp_path / "dense", "llama"), tmp_path / "made.gguf"
    pared.export(folder, out, to="gguf")
    before = out.read_bytes()

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(pared.serving.gguf.file.GGUFWriter, "write_tensor_data", full)
    with pytest.raises(ParedError, match="the disk filled up"):
        pared.export(folder, out, to="gguf", quantize="f16", overwrite=True)
    with pytest.raises(ParedError, match="the disk filled up"):
        pared.export(folder, tmp_path / "new.gguf", to="gguf")
    assert out.read_bytes() == before
    assert left_over(tmp_path) == ["dense", "made.gguf"]


def test_a_file_that_does_not_hold_the_model_is_told_of_and_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = saved(tmp_path / "dense", "llama")
    stored = pared.serving.gguf.file._stored

    def spoilt(tensor: Any, kind: Any) -> Any:
        made = stored(tensor, kind)
        if tensor.name == "blk.1.attn_v.weight":
            made = np.array(made)
            made.flat[0] ^= 1
        return made

    monkeypatch.setattr(pared.serving.gguf.file, "_stored", spoilt)
    for kind in ("f32", "bf16"):
        with pytest.raises(ParedError, match=r"other numbers in blk\.1\.attn_v\.weight"):
            pared.export(folder, tmp_path / "made.gguf", to="gguf", quantize=kind)
    assert left_over(tmp_path) == ["dense"]


def swapped(tokens: list[str]) -> list[str]:
    return [tokens[1], tokens[0], *tokens[2:]]


# what goes wrong -> what is written in place of the vocabulary, and what is said
SPOILT: dict[str, tuple[Callable[[Vocabulary], dict[str, Any]], str]] = {
    "two tokens swapped": (lambda own: {"tokens": swapped(own.tokens)}, r"tokens\[0\] is '.*', expected"),
    "a token is no token": (lambda own: {"types": [5, *own.types[1:]]}, r"token_type\[0\] is 5, expected 1"),
    "merges reversed": (lambda own: {"merges": own.merges[::-1]}, r"merges\[0\] is .*, expected 't h'"),
    "a merge too few": (lambda own: {"merges": own.merges[1:]}, r"lists 11 values of .*merges, expected 12"),
    "cut otherwise": (lambda _: {"pre": "gpt-2"}, r"pre is 'gpt-2', expected 'smollm'"),
    "begins with bos": (lambda own: {"adds_bos": not own.adds_bos}, r"add_bos_token is True, expected False"),
    "ends with eos": (lambda own: {"adds_eos": not own.adds_eos}, r"add_eos_token is True, expected False"),
    "no special tokens": (lambda _: {"special": {}}, rf"bos_token_id is None, expected {BEGIN}"),
    "one more of them": (lambda own: {"special": {**own.special, "mask": 3}}, r"mask_token_id is 3, expected None"),
    "another template": (lambda _: {"chat_template": "{{ x }}"}, r"chat_template is '\{\{ x \}\}', expected"),
    "no template": (lambda _: {"chat_template": None}, r"chat_template is None, expected"),
}


@pytest.mark.parametrize("wrong", SPOILT)
def test_a_spoilt_vocabulary_is_told_of_when_the_file_is_read_back(tmp_path: Path, wrong: str) -> None:
    """Regression: how many tokens and merges there are was compared, and not which."""
    spoil, told = SPOILT[wrong]
    description, own = described(model_of("llama"), "tiny"), vocabulary_of(tokenizer_of(), ROWS, "tiny")
    file = tmp_path / "made.gguf"
    write_gguf(file, description, own, "tiny", "f32")
    assert compare(file, description, own, "f32") == 0
    write_gguf(file, description, replace(own, **spoil(own)), "tiny", "f32")
    with pytest.raises(ParedError, match=rf"the file read back .*{told}"):
        compare(file, description, own, "f32")


def test_a_vocabulary_too_long_for_a_dry_run_is_compared_too(tmp_path: Path) -> None:
    rows = 2 * LONGEST
    description = described(model_of("llama", vocab_size=rows), "tiny")
    own, file = vocabulary_of(tokenizer_of(), rows, "tiny"), tmp_path / "made.gguf"
    write_gguf(file, description, replace(own, tokens=[*own.tokens[:-1], "[LAST]"]), "tiny", "f32")
    with pytest.raises(ParedError, match=rf"tokens\[{rows - 1}\] is '\[LAST\]', expected '\[PAD{rows - 1}\]'"):
        compare(file, description, own, "f32")


def test_chat_templates_with_names_are_all_in_the_file(tmp_path: Path) -> None:
    description, file = described(model_of("llama"), "tiny"), tmp_path / "made.gguf"
    templates = {"default": TEMPLATE, "tool-use": "{{ tools }}", "a": "{{ a }}"}
    own = replace(vocabulary_of(tokenizer_of(), ROWS, "tiny"), chat_template=templates)
    write_gguf(file, description, own, "tiny", "f32")
    assert compare(file, description, own, "f32") == 0
    fields = header_of(file).fields
    assert fields["tokenizer.chat_template"] == TEMPLATE
    assert fields["tokenizer.chat_templates"] == ["a", "tool_use"]
    assert fields["tokenizer.chat_template.tool_use"] == "{{ tools }}"


def test_a_model_in_float64_is_refused_by_what_to_ask_for_before_it_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Regression: KeyError: 'float64', behind the load of the model."""
    folder, file = saved(tmp_path / "dense", model_of("llama").double()), tmp_path / "made.gguf"
    with monkeypatch.context() as early:
        early.setattr(pared.entrypoints.export_gguf, "load", lambda *_: pytest.fail("it was loaded"))
        told = r"is stored in float64, which no \.gguf file is; quantize=f32 rounds it least, and f16, bf16, q8_0"
        with pytest.raises(ParedError, match=told):
            pared.export(folder, file, to="gguf")
    assert pared.export(folder, file, to="gguf", quantize="f32").self_check < 1e-6


def test_a_tokenizer_that_composes_characters_is_told_of(caplog: pytest.LogCaptureFixture) -> None:
    """Regression: NFC went by without a word, and llama.cpp gave other tokens for decomposed text."""
    own = tokenizer_of("qwen2")
    with caplog.at_level(logging.WARNING, "pared"):
        vocabulary_of(own, ROWS, "tiny")
        assert not caplog.records
        own.backend_tokenizer.normalizer = normalizers.NFC()
        vocabulary_of(own, ROWS, "tiny")
    assert "composes characters first (NFC), and llama.cpp does not" in caplog.text
    decomposed = "e\u0301 a"
    assert own(decomposed)["input_ids"] != tokenizer_of("qwen2")(decomposed)["input_ids"]


def test_a_weight_that_is_too_large_for_float16_is_refused(tmp_path: Path) -> None:
    model = model_of("llama")
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] = 1e5
    model.save_pretrained(tmp_path / "dense")
    tokenizer_of().save_pretrained(tmp_path / "dense")
    with pytest.raises(ParedError, match=r"blk\.0\.ffn_up\.weight: a weight of 1e\+05 is too large for float16"):
        pared.export(tmp_path / "dense", tmp_path / "made.gguf", to="gguf", quantize="f16")
