"""The tokenizer of a model in the fields of a GGUF file.

A file holds the tokens, the merges and the name of one of the ways of cutting text that llama.cpp has in its code
(``src/llama-vocab.cpp``). The way is found by comparing the steps of the tokenizer, not by its name or its tokens.

A file has no field for a normalizer, and llama.cpp composes no characters: of a tokenizer with NFC (Qwen) it gives the
tokens for composed text, and others for decomposed one (``e`` and a combining accent in place of ``\u00e9``).
"""

import json
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import product
from typing import Any

from gguf import TokenType
from transformers import PreTrainedTokenizerBase

from pared.errors import ParedError
from pared.models.pre_tokenizers import PRE_TOKENIZERS, steps_of
from pared.serving.gguf.sentencepiece import BYTES, begins_with_blank, is_sentencepiece, scores_of

log = logging.getLogger(__name__)

# what transformers calls a special token -> what a file does
SPECIAL = {"bos": "bos", "eos": "eos", "unk": "unknown", "sep": "seperator", "pad": "padding", "mask": "mask"}
NO_NAME = re.compile(r"[^A-Za-z0-9]")  # what the name of a chat template has none of in a file
PADDING = "[PAD{}]"  # of rows of the embeddings that are no token
LOWEST = -1e6  # the score of a token that nothing makes; any number below those of merges


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer of byte-level BPE or of SentencePiece.

    Attributes:
        pre: llama.cpp's name of the way text is cut before merges.
        tokens: by number; bytes are written as the tokenizer does, added tokens as they are in a text.
        types: of each, numbers of ``gguf.TokenType``.
        merges: of byte-level BPE, in order, two tokens with a blank between; empty for SentencePiece.
        special: numbers of special tokens, by what they are for.
        adds_bos: whether texts begin with a token of their own.
        adds_eos: whether they end with one.
        chat_template: Jinja, one or several by name; none for a model without dialogues.
        scores: of SentencePiece tokens, the highest for what is joined first; empty for byte-level BPE.
        adds_blank: whether a SentencePiece text gets a blank before it.
    """

    pre: str
    tokens: list[str]
    types: list[int]
    merges: list[str]
    special: dict[str, int]
    adds_bos: bool
    adds_eos: bool
    chat_template: Any
    scores: list[float] = field(default_factory=list)
    adds_blank: bool = False

    def fields(self) -> dict[str, object]:
        """Return the fields of a file: every one that begins with ``tokenizer.``."""
        listed = {"tokens": self.tokens, "scores": self.scores, "token_type": self.types, "merges": self.merges}
        return {
            "tokenizer.ggml.model": "llama" if self.scores else "gpt2",
            **({"tokenizer.ggml.add_space_prefix": self.adds_blank} if self.scores else {}),
            "tokenizer.ggml.pre": self.pre,
            **{f"tokenizer.ggml.{key}": values for key, values in listed.items() if values},  # no array is empty
            **{f"tokenizer.ggml.{SPECIAL[kind]}_token_id": number for kind, number in self.special.items()},
            "tokenizer.ggml.add_bos_token": self.adds_bos,
            "tokenizer.ggml.add_eos_token": self.adds_eos,
            **_templates(self.chat_template),
        }


def _templates(told: Any) -> dict[str, object]:
    """Return the fields of chat templates: the default one, and others by name."""
    by_name = dict(told) if isinstance(told, Mapping) else {"default": told} if told else {}
    fields: dict[str, object] = {}
    if "default" in by_name:
        fields["tokenizer.chat_template"] = by_name.pop("default")
    if by_name := {NO_NAME.sub("_", name): text for name, text in by_name.items()}:
        fields["tokenizer.chat_templates"] = sorted(by_name)
        fields |= {f"tokenizer.chat_template.{name}": text for name, text in by_name.items()}
    return fields


def vocabulary_of(tokenizer: PreTrainedTokenizerBase, rows: int, name: str) -> Vocabulary:
    """Return a tokenizer as the fields of a GGUF file.

    Args:
        tokenizer: of the tokenizers library: SentencePiece's, or byte-level BPE cut in one of the ways that
            :data:`PRE_TOKENIZERS` lists; a line says so if it composes characters (NFC), which llama.cpp does not.
        rows: of the embeddings; those behind the last token become unused tokens, as llama.cpp has as many of both.
        name: of the model, for messages.

    Raises:
        ParedError: it is of another kind, which llama.cpp would read otherwise, or puts other tokens around a text than
            bos and eos.
    """
    core = getattr(tokenizer, "backend_tokenizer", None)
    if core is None:
        raise ParedError(f"model {name!r}: its tokenizer {type(tokenizer).__name__} has no tokenizer.json, which a "
                         ".gguf file is made from; load it with transformers and save it as a fast one")  # fmt: skip
    told = json.loads(core.to_str())
    model, pieces = told["model"], is_sentencepiece(told)
    tokens, added = dict(model["vocab"]), {one["content"]: one for one in told["added_tokens"]}
    scores = scores_of(tokens, model["merges"], added, name) if pieces else {}
    unknown = str(model["unk_token"] or "") if pieces else None
    tokens.update({content: one["id"] for content, one in added.items()})
    if (last := max(tokens.values())) >= rows:
        raise ParedError(f"model {name!r}: its tokenizer has a token of the number {last}, its embeddings {rows} rows; "
                         "resize them with model.resize_token_embeddings")  # fmt: skip
    listed = [PADDING.format(number) for number in range(rows)]
    types = [int(TokenType.UNUSED)] * rows
    for content, number in tokens.items():
        listed[number] = content
        types[number] = int(_type(content, added.get(content), unknown))
    special = {kind: getattr(tokenizer, f"{kind}_token_id", None) for kind in SPECIAL}
    bos, eos = _added(tokenizer, name)
    return Vocabulary(
        pre="default" if pieces else _pre_tokenizer(told, name),
        tokens=listed,
        types=types,
        merges=[] if pieces else [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]],
        special={kind: int(number) for kind, number in special.items() if number is not None},
        adds_bos=bos,
        adds_eos=eos,
        chat_template=getattr(tokenizer, "chat_template", None),
        scores=[scores.get(token, LOWEST) for token in listed] if pieces else [],
        adds_blank=pieces and begins_with_blank(told, name),
    )


def _type(token: str, added: Mapping[str, Any] | None, unknown: str | None) -> TokenType:
    """Return what a token is; a SentencePiece tokenizer is told by the token for what it does not know."""
    if unknown is not None and (token in BYTES or token == unknown):
        return TokenType.UNKNOWN if token == unknown else TokenType.BYTE
    if added is None:
        return TokenType.NORMAL
    return TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED


def _pre_tokenizer(told: Mapping[str, Any], name: str) -> str:
    """Return llama.cpp's name of the way a tokenizer cuts text.

    Raises:
        ParedError: it has none; says what the tokenizer does.
    """
    model = told["model"]
    bare = model["type"] == "BPE" and not any(
        model.get(key) for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback")
    )
    normalizer = (told["normalizer"] or {}).get("type")
    steps = tuple(steps_of(told["pre_tokenizer"]))
    if bare and normalizer in (None, "NFC"):
        for pre, (known, whole_first) in PRE_TOKENIZERS.items():
            if (steps, bool(model.get("ignore_merges"))) == (known, whole_first):
                if normalizer is not None:
                    log.warning("the tokenizer of %s composes characters first (NFC), and llama.cpp does not: "
                                "text with combining characters has other tokens there", name)  # fmt: skip
                return pre
    fallback = " with bytes for what it does not know" if model.get("byte_fallback") else ""
    found = f"{model['type']}{fallback}, cut by {' and '.join(f'{kind} {value}' for kind, value in steps) or 'nothing'}"
    raise ParedError(f"model {name!r}: a .gguf file is written of byte-level BPE tokenizers that cut text as "
                     f"{', '.join(PRE_TOKENIZERS)} do; its tokenizer is {found}")  # fmt: skip


def _added(tokenizer: PreTrainedTokenizerBase, name: str) -> tuple[bool, bool]:
    """Return whether a tokenizer puts its bos token before and its eos token behind a text.

    Raises:
        ParedError: it adds anything else, which a file has no field for.
    """
    bare, whole = (tokenizer("a", add_special_tokens=added)["input_ids"] for added in (False, True))
    bos, eos = ([] if one is None else [one] for one in (tokenizer.bos_token_id, tokenizer.eos_token_id))
    for begins, ends in product((False, True), repeat=2):
        if whole == (bos if begins else []) + bare + (eos if ends else []):
            return begins and bool(bos), ends and bool(eos)
    raise ParedError(f"model {name!r}: its tokenizer makes {tokenizer.convert_ids_to_tokens(whole)} of 'a'; a .gguf "
                     f"file can say only that bos ({tokenizer.bos_token}) comes before a text and eos "
                     f"({tokenizer.eos_token}) behind it; change the post-processor in tokenizer.json")  # fmt: skip
