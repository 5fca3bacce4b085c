"""GGUF files in llama.cpp itself: the tokens and the greedy continuations that transformers has."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import normalizers
from transformers import PreTrainedModel

import pared
from llama_cpp import PROMPTS, Engine, in_transformers
from pared.models.gguf import header_of
from pared.models.pre_tokenizers import PRE_TOKENIZERS
from unit.serving.gguf_models import (
    SENTENCEPIECE_ROWS,
    biased_model,
    changed_model,
    model_of,
    narrow_,
    narrowed_model,
    saved,
    sentencepiece,
    tokenizer_of,
)
from unit.serving.test_sentencepiece import metaspace, prepended

pytestmark = pytest.mark.serve
TOKENS = 32
WIDTHS, HEADS = [48, 16, 40], [1, 2, 2]
LLAMA3 = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
          "high_freq_factor": 4.0, "original_max_position_embeddings": 32}  # fmt: skip
# name -> (a model, what llama.cpp takes it for)
MODELS: dict[str, tuple[Callable[[], PreTrainedModel], str]] = {
    "llama": (lambda: model_of("llama"), "llama"),
    "llama, biases": (lambda: model_of("llama", attention_bias=True, mlp_bias=True), "llama"),
    "llama, scaled positions": (lambda: model_of("llama", rope_parameters=LLAMA3), "llama"),
    "llama, one width": (lambda: narrowed_model("llama", [24] * 3), "llama"),
    "llama, fewer heads": (lambda: narrowed_model("llama", [48] * 3, [1] * 3), "llama"),
    "llama, widths by layer": (lambda: narrowed_model("llama", WIDTHS), "deci"),
    "llama, widths and heads by layer": (lambda: narrowed_model("llama", WIDTHS, HEADS), "deci"),
    "llama, biases where there are none": (biased_model, "deci"),
    "llama, low rank": (lambda: changed_model("low_rank"), "llama"),
    "llama, sparse": (lambda: changed_model("sparse"), "llama"),
    "mistral": (lambda: model_of("mistral"), "llama"),
    "mistral, widths by layer": (lambda: narrowed_model("mistral", WIDTHS, HEADS), "deci"),
    "qwen2": (lambda: model_of("qwen2"), "qwen2"),
    "qwen2, fewer heads": (lambda: narrowed_model("qwen2", [48] * 3, [1] * 3), "deci"),
    "qwen2, widths and heads by layer": (lambda: narrowed_model("qwen2", WIDTHS, HEADS), "deci"),
    "qwen2, linear positions": (
        lambda: model_of("qwen2", rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}), "deci"),
    "qwen3": (lambda: model_of("qwen3"), "qwen3"),
    "qwen3, widened": (lambda: narrowed_model("qwen3", WIDTHS), "qwen3"),
    "gemma3": (lambda: model_of("gemma3"), "gemma3"),
    "gemma3, one width": (lambda: narrowed_model("gemma3", [24] * 7), "gemma3"),
    "gemma3, widened": (lambda: narrowed_model("gemma3", [48, 16, 40, 48, 16, 40, 48]), "gemma3"),
}  # fmt: skip
# Where the ways of cutting text differ, and special and added tokens.
TEXTS = (
    "the man's 123456 and 12 the",
    "\n\n\n  than  12\r\n\t13 THE'S it'S",
    "caf\u00e9 \u4f60\u597d 1\u00bd \u0661\u0662\u0663!!??  ...\n \n x",
)


def assert_same(engine: Engine, folder: Path, file: Path, prompts: tuple[str, ...] = PROMPTS) -> None:
    expected, found = in_transformers(str(folder), prompts, TOKENS), engine.ask(file, prompts, TOKENS)
    assert found["prompts"] == expected["prompts"]
    assert found["answers"] == expected["answers"]


@pytest.mark.parametrize("name", MODELS)
def test_a_file_answers_in_llama_cpp_as_the_folder_in_transformers(
    llama_cpp: Engine, tmp_path: Path, name: str
) -> None:
    make, architecture = MODELS[name]
    folder, file = saved(tmp_path / "folder", make()), tmp_path / "made.gguf"
    pared.export(folder, file, to="gguf", quantize="f32")
    assert header_of(file).fields["general.architecture"] == architecture
    assert_same(llama_cpp, folder, file)


@pytest.mark.parametrize("pre", PRE_TOKENIZERS)
@pytest.mark.parametrize("begins", [False, True])
def test_text_becomes_the_same_tokens(llama_cpp: Engine, tmp_path: Path, pre: str, begins: bool) -> None:
    folder, file = saved(tmp_path / "folder", "llama"), tmp_path / "made.gguf"
    own = tokenizer_of(pre, begins)
    own.save_pretrained(folder)
    pared.export(folder, file, to="gguf")
    for text, found in zip(TEXTS, llama_cpp.ask(file, TEXTS, 1)["prompts"], strict=True):
        assert found == own(text)["input_ids"]


# name -> how a SentencePiece tokenizer puts a blank before a text
BLANKS: dict[str, Callable[[Any], None]] = {"none": lambda _: None, "prepended": prepended, "first": metaspace("first")}


@pytest.mark.parametrize("blank", BLANKS)
def test_sentencepiece_text_becomes_the_same_tokens(llama_cpp: Engine, tmp_path: Path, blank: str) -> None:
    model_of("gemma3", vocab_size=SENTENCEPIECE_ROWS).save_pretrained(tmp_path / "folder")
    own = sentencepiece()
    BLANKS[blank](own.backend_tokenizer)
    own.save_pretrained(tmp_path / "folder")
    pared.export(tmp_path / "folder", tmp_path / "made.gguf", to="gguf")
    texts = (*TEXTS, "the than an ant\n\nhe  the the", "th e th", " s")
    for text, found in zip(texts, llama_cpp.ask(tmp_path / "made.gguf", texts, 1)["prompts"], strict=True):
        assert found == own(text)["input_ids"], text


def test_decomposed_text_has_the_tokens_of_a_tokenizer_without_nfc(llama_cpp: Engine, tmp_path: Path) -> None:
    folder, file, own = saved(tmp_path / "folder", "llama"), tmp_path / "made.gguf", tokenizer_of("qwen2")
    own.backend_tokenizer.normalizer = normalizers.NFC()
    own.save_pretrained(folder)
    pared.export(folder, file, to="gguf")
    composed, decomposed = "caf\u00e9 a", "cafe\u0301 a"
    found = llama_cpp.ask(file, (composed, decomposed), 1)["prompts"]
    plain = [tokenizer_of("qwen2")(text)["input_ids"] for text in (composed, decomposed)]
    assert found == plain
    assert found[0] == own(composed)["input_ids"]
    assert found[1] != own(decomposed)["input_ids"]


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """SmolLM2, dense and with fewer channels in every block, as few in each or in each another number."""

    def folder_of(kind: str) -> Path:
        model, folder = pared.load("embedded:smollm2-135m"), tmp_path_factory.mktemp("smollm2")
        blocks = range(model.config.num_hidden_layers)
        by_layer = ([1536 - 32 * (block % 5) for block in blocks], [3 - block % 7 // 6 for block in blocks])
        widths: dict[str, Any] = {"one width": ([1344 for _ in blocks], None), "by layer": by_layer}
        if kind in widths:
            narrow_(model, *widths[kind])
        model.save_pretrained(folder)
        pared.load_tokenizer("embedded:smollm2-135m").save_pretrained(folder)
        return folder

    return folder_of


@pytest.mark.parametrize("kind", ["dense", "one width", "by layer"])
def test_smollm2_answers_in_llama_cpp_as_in_transformers(
    llama_cpp: Engine, smollm2: Callable[[str], Path], kind: str, tmp_path: Path
) -> None:
    folder, file = smollm2(kind), tmp_path / "made.gguf"
    pared.export(folder, file, to="gguf", quantize="f32")
    assert header_of(file).fields["general.architecture"] == ("deci" if kind == "by layer" else "llama")
    assert_same(llama_cpp, folder, file)
