"""SentencePiece vocabularies (Gemma, Llama 2, Mistral) as llama.cpp reads them.

llama.cpp joins the neighbours whose token has the highest score; a tokenizer of transformers joins those whose merge is
listed first. The two are the same where every way to make a token is listed, and the ways to make one stand together:
then its place in that order is its score.
"""

import logging
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from pared.errors import ParedError

log = logging.getLogger(__name__)

BLANK = "\u2581"  # what stands for a blank inside of tokens
BYTES = {f"<0x{number:02X}>" for number in range(256)}
_REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": BLANK}
_PREPEND = {"type": "Prepend", "prepend": BLANK}
_NOTHING = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False}


def is_sentencepiece(stored: Mapping[str, Any]) -> bool:
    """Whether a ``tokenizer.json`` is of such a vocabulary: BPE that writes what it does not know as bytes."""
    return stored["model"]["type"] == "BPE" and bool(stored["model"].get("byte_fallback"))


def begins_with_blank(stored: Mapping[str, Any], name: str) -> bool:
    """Return whether a text gets a blank before it.

    Args:
        stored: the ``tokenizer.json``.
        name: of the model, for messages.

    Raises:
        ParedError: text is prepared in a way that llama.cpp does not have.
    """
    normalizer, cutting, model = stored["normalizer"], stored["pre_tokenizer"], stored["model"]
    plain = not any(
        model.get(key) for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "ignore_merges")
    )
    steps = normalizer["normalizers"] if (normalizer or {}).get("type") == "Sequence" else [normalizer]
    if plain and cutting in (None, _NOTHING) and steps in ([_REPLACE], [_PREPEND, _REPLACE]):
        return len(steps) == 2
    metaspace = plain and normalizer is None and (cutting or {}).get("type") == "Metaspace"
    if metaspace and cutting["replacement"] == BLANK and not cutting.get("split", True):
        if cutting["prepend_scheme"] == "first":
            log.warning("the tokenizer of %s puts a blank before a text alone, and llama.cpp behind special tokens too: "
                        "text behind one has other tokens there", name)  # fmt: skip
        return bool(cutting["prepend_scheme"] != "never")
    raise ParedError(f"model {name!r}: a .gguf file is written of SentencePiece tokenizers that replace blanks by "
                     f"{BLANK!r} and cut text nowhere; its tokenizer has the normalizer {normalizer}, the pre-tokenizer "
                     f"{cutting}")  # fmt: skip


def scores_of(
    vocabulary: Mapping[str, int], merges: Iterable[Any], added: Collection[str], name: str
) -> dict[str, float]:
    """Return the scores of the tokens that merges make, the highest for what is joined first.

    Args:
        vocabulary: tokens and their numbers, without those that were added.
        merges: in order, each two tokens, or both in a text with a blank between.
        added: tokens that are looked for before anything is joined, and are no part of a merge.
        name: of the model, for messages.

    Raises:
        ParedError: bytes are missing, or no scores give the merges this order.
    """
    if missing := sorted(BYTES - vocabulary.keys()):
        raise ParedError(f"model {name!r}: its tokenizer has no token for {len(missing)} of the 256 bytes "
                         f"({missing[0]}), which llama.cpp writes unknown text with")  # fmt: skip
    scores: dict[str, float] = {}
    ways: dict[str, set[int]] = {}
    last = ""
    for merge in merges:
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        joined = left + right
        if joined not in vocabulary:
            raise ParedError(f"model {name!r}: its tokenizer joins {left!r} and {right!r}, which make no token")
        if joined != last and joined in scores:
            raise ParedError(f"model {name!r}: its tokenizer joins {left!r} and {right!r} later than others that make "
                             f"{joined!r}, which llama.cpp joins at one rank")  # fmt: skip
        scores.setdefault(joined, -float(len(scores)))
        ways.setdefault(joined, set()).add(len(left))
        last = joined
    pieces = vocabulary.keys() - set(added)
    for token in pieces:
        found = {cut for cut in range(1, len(token)) if token[:cut] in pieces and token[cut:] in pieces}
        if unlisted := found - ways.get(token, set()):
            cut = min(unlisted)
            raise ParedError(f"model {name!r}: its tokenizer does not join {token[:cut]!r} and {token[cut:]!r}, and "
                             f"llama.cpp would, as {token!r} is a token")  # fmt: skip
    return scores
