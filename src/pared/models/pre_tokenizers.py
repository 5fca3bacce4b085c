"""How text is cut before merges, by the names that llama.cpp has for it (``src/llama-vocab.cpp``).

A GGUF file says only the name; transformers reads such a file without it, and cuts as GPT-2 does.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from tokenizers import Regex, Tokenizer
from tokenizers.pre_tokenizers import ByteLevel, Digits, PreTokenizer, Sequence, Split

# What both regular expressions have before and behind the numbers.
_HEAD, _TAIL = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|",
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
)
Steps = tuple[tuple[str, object], ...]
# llama.cpp's name -> the steps of the tokenizer, and whether a whole token is looked for before merges
PRE_TOKENIZERS: dict[str, tuple[Steps, bool]] = {
    "gpt-2": ((("ByteLevel", True),), False),
    "smollm": ((("Digits", True), ("ByteLevel", True)), False),
    "qwen2": ((("Split", _HEAD + r"\p{N}" + _TAIL), ("ByteLevel", False)), False),
    "llama-bpe": ((("Split", _HEAD + r"\p{N}{1,3}" + _TAIL), ("ByteLevel", False)), True),
}


def cut_as(core: Tokenizer, name: str) -> None:
    """Have a byte-level BPE tokenizer cut text in a way that is listed here, in place; others are left as they are."""
    if name not in PRE_TOKENIZERS:
        return
    steps, whole_first = PRE_TOKENIZERS[name]
    core.pre_tokenizer = Sequence([_step(kind, value) for kind, value in steps])
    core.model.ignore_merges = whole_first


def _step(kind: str, value: Any) -> PreTokenizer:
    if kind == "Split":
        return Split(Regex(value), "isolated")
    return Digits(individual_digits=value) if kind == "Digits" else ByteLevel(add_prefix_space=False, use_regex=value)


def steps_of(told: Mapping[str, Any] | None) -> Iterator[tuple[str, object]]:
    """Yield the steps of a pre-tokenizer as :data:`PRE_TOKENIZERS` has them; what differs is told whole."""
    if told is None:
        return
    kind = told["type"]
    if kind == "Sequence":
        for one in told["pretokenizers"]:
            yield from steps_of(one)
    elif kind == "ByteLevel" and not told["add_prefix_space"]:
        yield kind, told.get("use_regex", True)
    elif kind == "Digits":
        yield kind, told["individual_digits"]
    elif kind == "Split" and told["behavior"] in ("Isolated", "Removed") and "Regex" in told["pattern"]:
        kept = told["behavior"] == "Isolated" and not told["invert"]
        removed = told["behavior"] == "Removed" and told["invert"]  # the same cuts
        yield kind, told["pattern"]["Regex"] if kept or removed else told
    else:
        yield kind, {key: value for key, value in told.items() if key != "type"}
