"""How long windows may be: what a model has positions for, and defaults that yield where an order does not."""

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pared.errors import ParedError, TextTooShortError
from pared.names import text_called

if TYPE_CHECKING:
    from pydantic import BaseModel
    from transformers import PretrainedConfig

log = logging.getLogger(__name__)

# Models that count positions from behind the number of their padding token, as RoBERTa does.
COUNT_FROM_PADDING = frozenset({
    "camembert", "data2vec-text", "ibert", "layoutlmv3", "lilt", "longformer", "luke", "markuplm", "mpnet", "roberta",
    "roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl", "xmod",
})  # fmt: skip


@dataclass(frozen=True)
class Length:
    """Tokens of a window.

    Attributes:
        tokens: how many.
        is_default: not asked for it, so that it yields, with a note, where there are fewer.
    """

    tokens: int
    is_default: bool = False

    @classmethod
    def of(cls, asked: "BaseModel", field: str = "length") -> "Length":
        """Return the length that a field of a recipe asks for, or its default."""
        return cls(getattr(asked, field), field not in asked.model_fields_set)

    @classmethod
    def given(cls, asked: int | None, default: int) -> "Length":
        """Return the length that was asked for, the default if none was."""
        return cls(default, is_default=True) if asked is None else cls(asked)

    def within(self, config: "PretrainedConfig", what: str = "windows") -> "Length":
        """Return the length, a default no longer than the model has positions.

        Args:
            config: of the model.
            what: is that long, for messages.

        Raises:
            ParedError: more was asked for than the model has positions.
        """
        positions = positions_of(config)
        if positions is None or self.tokens <= positions:
            return self
        if not self.is_default:
            raise too_long(self.tokens, positions, what)
        log.warning("%s have %d tokens, the most this model takes, in place of %d", what, positions, self.tokens)
        return Length(positions, is_default=True)

    def within_text(self, available: int, text: str) -> int:
        """Return the tokens of a window, for a default no more than a text has.

        Raises:
            TextTooShortError: more was asked for than the text has, or it has fewer than two.
        """
        if self.tokens <= available:
            return self.tokens
        if available == 0:  # where files of a tokenizer are missing, transformers makes one without words
            raise TextTooShortError(
                f"the tokenizer makes no tokens of {text_called(text)}; if the folder lacks its files "
                "(tokenizer.json, tokenizer_config.json), put them there, else use a longer text"
            )
        if not self.is_default or available < 2:
            raise TextTooShortError(
                f"{text_called(text)} has {available} token{'s' * (available != 1)}, fewer than one window of "
                f"{self.tokens}; use a longer text or a smaller length"
            )
        log.warning("a window of %s has %d tokens, which is all there are, in place of %d", text_called(text),
                    available, self.tokens)  # fmt: skip
        return available


def positions_of(config: "PretrainedConfig") -> int | None:
    """Return the tokens a model takes at most; None if its configuration names no limit."""
    text_config = config.get_text_config()
    positions = getattr(text_config, "max_position_embeddings", None)
    if not isinstance(positions, int) or positions <= 0:
        return None
    if text_config.model_type in COUNT_FROM_PADDING:
        positions -= (getattr(text_config, "pad_token_id", None) or 0) + 1
    return positions


def too_long(length: int, positions: int, what: str = "windows") -> ParedError:
    """Return the error of a length that a model has no positions for."""
    return ParedError(f"{what} of {length} tokens, but this model has {positions} positions; use a smaller length")
