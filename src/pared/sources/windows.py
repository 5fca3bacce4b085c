"""Token windows: a text cut into pieces of equal length, and the digest that identifies them."""

import hashlib
import logging
from dataclasses import dataclass
from typing import Literal

import torch
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from pared.errors import ParedError
from pared.sources.texts import Text

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Windows:
    """Windows of a text.

    Attributes:
        tokens: ``(windows, length)`` int64.
        digest: SHA-256 of the tokens as little-endian int64, the identity of what was measured on.
        text: name of the text.
        origin: where the text was read from.
        stand_in: whether it only stands in for a real corpus.
    """

    tokens: torch.Tensor
    digest: str
    text: str
    origin: str
    stand_in: bool

    def describe(self) -> dict[str, object]:
        """Return what a manifest records of these windows."""
        return {
            "text": self.text,
            "origin": self.origin,
            "stand_in": self.stand_in,
            "windows": self.tokens.shape[0],
            "length": self.tokens.shape[1],
            "digest": self.digest,
        }


def cut(
    text: Text,
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    windows: int | None,
    sampling: Literal["consecutive", "random-offset"] = "consecutive",
    seed: int = 0,
) -> Windows:
    """Tokenise a whole text once, without special tokens, and cut it into windows that do not overlap.

    ``random-offset`` windows start at seeded random tokens and may overlap.

    Args:
        text: the text.
        tokenizer: of the model.
        length: tokens in a window.
        windows: how many; None means as many as fit.
        sampling: where windows start.
        seed: of the random offsets.

    Raises:
        ParedError: the text is shorter than one window, or a window predicts nothing.
    """
    if length < 2 or (windows is not None and windows < 1):
        raise ParedError(
            f"text {text.name!r}: cannot cut {windows} windows of {length} tokens; "
            "expected at least 1 window of at least 2 tokens"
        )
    ids = torch.tensor(tokenizer(text.joined, add_special_tokens=False, verbose=False)["input_ids"], dtype=torch.int64)
    if len(ids) < length:
        raise ParedError(
            f"text {text.name!r} has {len(ids)} tokens, fewer than one window of {length}; "
            "use a longer text or a smaller length"
        )
    if sampling == "random-offset":
        random = torch.Generator().manual_seed(seed)
        count = windows or len(ids) // length
        starts = torch.randint(0, len(ids) - length + 1, (count,), generator=random)
        tokens = torch.stack([ids[start : start + length] for start in starts.tolist()])
    else:
        available = len(ids) // length
        if windows is not None and windows > available:
            log.warning(
                "text %r has only %d of the %d windows of %d tokens asked for",
                text.name,
                available,
                windows,
                length,
            )
        count = min(windows or available, available)
        tokens = ids[: count * length].view(count, length)
    return Windows(tokens, digest_of(tokens), text.name, text.origin, text.stand_in)


def require_fits(config: PretrainedConfig, windows: Windows) -> None:
    """Check that a model can take these windows.

    Raises:
        ParedError: they are longer than the model has positions, or hold tokens it does not know.
    """
    text_config = config.get_text_config()
    positions, length = getattr(text_config, "max_position_embeddings", None), windows.tokens.shape[1]
    if isinstance(positions, int) and length > positions > 0:
        raise ParedError(f"windows of {length} tokens, but this model has {positions} positions; use a smaller length")
    vocabulary, largest = getattr(text_config, "vocab_size", None), int(windows.tokens.max())
    if isinstance(vocabulary, int) and largest >= vocabulary:
        raise ParedError(
            f"text {windows.text!r} has token {largest}, but this model knows {vocabulary}; the tokenizer is another "
            "model's"
        )


def digest_of(tokens: torch.Tensor) -> str:
    """Return the SHA-256 of tokens as little-endian int64."""
    return hashlib.sha256(tokens.contiguous().numpy().astype("<i8").tobytes()).hexdigest()
