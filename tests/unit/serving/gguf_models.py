"""Tiny models of the families that GGUF files are written of, with a byte-level BPE tokenizer."""

from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import AddedToken, Tokenizer, decoders, models, processors
from transformers import PreTrainedModel, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode
from transformers.models.gemma.tokenization_gemma import GemmaTokenizer

from pared.checkpoint.save import mark
from pared.models.pre_tokenizers import cut_as
from pared.modules import LowRankLinear, PivotedLinear, SparseLinear, replace_module
from pared.modules.narrow import narrowed
from pared.serving.gguf.sentencepiece import BLANK

MERGES = [
    ("t", "h"), ("th", "e"), ("Ġ", "the"), ("a", "n"), ("1", "2"), ("3", "4"), ("12", "3"), ("Ġ", "1"), ("Ċ", "Ċ"),
    ("'", "s"), ("'", "S"), ("Ġ", "Ġ"),
]  # fmt: skip
BEGIN = 256 + len(MERGES)  # the first of the special tokens
TEMPLATE = "{% for message in messages %}<s>{{ message['content'] }}</s>{% endfor %}"
ROWS = 280  # of the embeddings; a few are no token
_SIZES: dict[str, Any] = {
    "vocab_size": ROWS, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "bos_token_id": BEGIN, "eos_token_id": BEGIN + 1,
    "initializer_range": 0.2,
}  # fmt: skip
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {"tie_word_embeddings": True}),
    "mistral": ("MistralConfig", {"sliding_window": None, "head_dim": 8}),
    "qwen2": ("Qwen2Config", {}),
    # the width of a head that transformers takes, whatever a file says
    "qwen3": ("Qwen3Config", {"head_dim": 128, "num_attention_heads": 2, "num_key_value_heads": 1}),
    "gemma3": ("Gemma3TextConfig", {"head_dim": 8, "num_hidden_layers": 7, "query_pre_attn_scalar": 8,
                                    "sliding_window": 16}),
}


def tokenizer_of(pre: str = "smollm", begins: bool = False) -> PreTrainedTokenizerFast:
    """Return a tokenizer of bytes and a few merges that cuts text in one of the ways of llama.cpp."""
    vocabulary = {piece: number for number, piece in enumerate(bytes_to_unicode().values())}
    for pair in MERGES:
        vocabulary["".join(pair)] = len(vocabulary)
    core = Tokenizer(models.BPE(vocabulary, MERGES))
    cut_as(core, pre)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken("<s>", special=True), AddedToken("</s>", special=True)])
    core.add_tokens([AddedToken("<tool>", normalized=False)])
    if begins:
        core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BEGIN)])
    made = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", pad_token="</s>")
    made.chat_template = TEMPLATE
    return made



LETTERS = [BLANK, *"thean12s\n"]
PIECES = ["th", "the", f"{BLANK}the", "an", "12", f"{BLANK}{BLANK}", "he", f"{BLANK}t", "\n\n", "nt", f"{BLANK}an"]
SENTENCEPIECE_ROWS = 4 + 256 + len(LETTERS) + len(PIECES) + 3  # the last are no token


def ways_to_make(piece: str) -> list[tuple[str, str]]:
    """Return the merges that make a piece of others."""
    known = {*LETTERS, *PIECES}
    cuts = [(piece[:cut], piece[cut:]) for cut in range(len(piece) - 1, 0, -1)]
    return [cut for cut in cuts if known.issuperset(cut)]


def sentencepiece() -> PreTrainedTokenizerFast:
    """Return a tokenizer as Gemma has it, of bytes, a few letters and pieces."""
    pieces = ["<pad>", "<eos>", "<bos>", "<unk>", *(f"<0x{number:02X}>" for number in range(256)), *LETTERS, *PIECES]
    return GemmaTokenizer(vocab={piece: number for number, piece in enumerate(pieces)},
                          merges=[way for piece in PIECES for way in ways_to_make(piece)], mask_token=None)  # fmt: skip

def model_of(family: str, **fields: Any) -> PreTrainedModel:
    """Return a random model, its biases and norms too."""
    config_class, own = CONFIGS[family]
    config = getattr(transformers, config_class)(**{**_SIZES, **own, **fields})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config).eval()
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                torch.nn.init.normal_(parameter, float("norm" in name), 0.2)
    return model


def saved(folder: Path, model: PreTrainedModel | str, **fields: Any) -> Path:
    """Save a model, or that of a family, with its tokenizer."""
    (model_of(model, **fields) if isinstance(model, str) else model).save_pretrained(folder)
    tokenizer_of().save_pretrained(folder)
    return folder


def narrowed_model(family: str, widths: list[int], heads: list[int] | None = None) -> PreTrainedModel:
    """Return a model of a family that was narrowed; see :func:`narrow_`."""
    model = model_of(family)
    narrow_(model, widths, heads)
    return model


def narrow_(model: PreTrainedModel, widths: list[int], heads: list[int] | None = None) -> None:
    """Keep so many channels of the MLP of each layer, and so many key/value heads with their queries."""
    config = model.config
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    queries = config.num_attention_heads // config.num_key_value_heads
    for number, layer in enumerate(model.model.layers):
        keys = head * (heads[number] if heads else config.num_key_value_heads)
        mlp, attention = layer.mlp, layer.self_attn
        cut(mlp, ("gate_proj", "up_proj"), "down_proj", widths[number])
        cut(attention, ("k_proj", "v_proj"), None, keys)
        cut(attention, ("q_proj",), "o_proj", keys * queries)
    mark(model)


def cut(parent: Any, makers: tuple[str, ...], reader: str | None, width: int) -> None:
    """Keep the first outputs of some layers, and the first inputs of the one that reads them."""
    for name in makers:
        old = getattr(parent, name)
        if width < old.out_features:
            setattr(parent, name, narrowed(old, old.weight[:width], None if old.bias is None else old.bias[:width]))
    if reader is not None and width < getattr(parent, reader).in_features:
        old = getattr(parent, reader)
        setattr(parent, reader, narrowed(old, old.weight[:, :width], old.bias))


def biased_model() -> PreTrainedModel:
    """Return a narrowed Llama whose layers that read channels and heads have biases, which the architecture lacks."""
    model = narrowed_model("llama", [48, 16, 40], [1, 2, 2])
    for layer in model.model.layers:
        for parent, name in ((layer.mlp, "down_proj"), (layer.self_attn, "o_proj")):
            old = getattr(parent, name)
            setattr(parent, name, narrowed(old, old.weight, torch.randn(old.out_features)))
    mark(model)
    return model


def changed_model(kind: str, rank: int = 8) -> PreTrainedModel:
    """Return a Llama all of whose matrices have a low rank, or half of whose weights are zeros."""
    model = model_of("llama")
    for name, old in [*model.named_modules()]:
        if not isinstance(old, torch.nn.Linear) or name == "lm_head":
            continue
        if kind == "sparse":
            mask = torch.rand(old.weight.shape) < 0.5
            new: Any = SparseLinear.of(old.weight.detach() * mask, mask, None)
        else:
            layer = {"low_rank": LowRankLinear, "pivoted": PivotedLinear}[kind]
            new = layer(old.in_features, old.out_features, rank, bias=False)
        replace_module(model, name, new)
    mark(model)
    return model
