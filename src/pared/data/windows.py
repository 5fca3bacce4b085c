"""Token windows: a text cut into pieces of equal length, or labelled examples, and the digest of either."""

import hashlib
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from transformers import BatchEncoding, PretrainedConfig, PreTrainedTokenizerBase

from pared.data.lengths import Length, positions_of, too_long
from pared.data.texts import Text
from pared.errors import ParedError
from pared.schema.recipe import Sampling

log = logging.getLogger(__name__)

NO_LABEL = -100  # transformers' own


CONTEXT = 4  # tokens by which one is told from another: itself and those before it
MIX = 0x5851F42D4C957F2D  # an odd factor, of a linear congruential generator


@dataclass(frozen=True)
class Windows:
    """Windows of a text, or labelled examples, one a window.

    Attributes:
        tokens: ``(windows, length)`` int64.
        digest: SHA-256 of the tokens as little-endian int64, then of mask, labels and segments if there are any; the
            identity of what was measured on.
        text: name of the text.
        origin: where the text was read from.
        stand_in: whether it only stands in for a real corpus.
        mask: 1 for a token and 0 for padding, ``(windows, length)`` int64; none if nothing is padded.
        labels: the class of a window ``(windows,)``, or of every token ``(windows, length)`` with -100 where there is
            none, int64; none for a text.
        segments: 0 for the first text of a pair and 1 for the second, ``(windows, length)`` int64; none if there are
            no pairs, or the tokenizer does not distinguish them.
        whole: SHA-256 of the whole text that this is from; empty for labelled examples.
        spans: the characters of that text that every window begins and ends at.
    """

    tokens: torch.Tensor
    digest: str
    text: str
    origin: str
    stand_in: bool
    mask: torch.Tensor | None = None
    labels: torch.Tensor | None = None
    segments: torch.Tensor | None = None
    whole: str = ""
    spans: tuple[tuple[int, int], ...] = ()

    @property
    def beside(self) -> dict[str, torch.Tensor]:
        """What a model is given besides the tokens, by the name of its argument."""
        named = {"attention_mask": self.mask, "token_type_ids": self.segments}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    @property
    def real_tokens(self) -> int:
        """How many tokens there are, padding aside."""
        return self.tokens.numel() if self.mask is None else int(self.mask.sum())

    @property
    def distinct_tokens(self) -> int:
        """How many tokens there are that differ, or that one of the three before them tells apart, padding aside.

        What is read twice teaches nothing the second time: of a text that is repeated this counts one copy.
        """
        keys = self.tokens.new_zeros(self.tokens.shape)
        for back in range(CONTEXT):
            before = torch.full_like(self.tokens, -1)
            before[:, back:] = self.tokens[:, : self.tokens.shape[1] - back]
            keys = (keys * MIX) ^ (before + 1)  # int64 wraps around
            keys ^= keys >> 29
        return len(torch.unique(keys if self.mask is None else keys[self.mask.bool()]))

    def first(self, windows: int) -> "Windows":
        """Return the first windows, under the digest of all."""
        mask, labels, segments = (
            None if tensor is None else tensor[:windows] for tensor in (self.mask, self.labels, self.segments)
        )
        return replace(
            self, tokens=self.tokens[:windows], mask=mask, labels=labels, segments=segments, spans=self.spans[:windows]
        )

    def describe(self) -> dict[str, object]:
        """Return what a manifest records of these windows."""
        description: dict[str, object] = {
            "text": self.text,
            "origin": self.origin,
            "stand_in": self.stand_in,
            "windows": self.tokens.shape[0],
            "length": self.tokens.shape[1],
            "digest": self.digest,
        }
        if self.whole:
            description["whole"], description["characters"] = self.whole, [list(span) for span in merged(self.spans)]
        if self.mask is not None:
            description["tokens"] = int(self.mask.sum())
        if self.labels is not None:
            description["labels"] = int((self.labels != NO_LABEL).sum())
        return description


def cut(
    text: Text,
    tokenizer: PreTrainedTokenizerBase,
    length: int | Length,
    windows: int | None,
    sampling: Sampling = "consecutive",
    seed: int = 0,
    stride: int | None = None,
) -> Windows:
    """Tokenise a whole text once, without special tokens, and cut it into windows that do not overlap.

    ``random-offset`` windows start at seeded random tokens and may overlap; ``shuffled`` ones are so many of the
    consecutive ones, in the order that ``torch.randperm`` puts them in.

    Args:
        text: the text.
        tokenizer: of the model.
        length: tokens in a window; a default is shortened to what the text has.
        windows: how many; None means as many as fit.
        sampling: where windows start.
        seed: of the random offsets, or of the order.
        stride: consecutive windows begin every so many tokens; None means that they do not overlap.

    Raises:
        ParedError: the text is shorter than one window, the stride is longer, or a window predicts nothing.
    """
    asked = length if isinstance(length, Length) else Length(length)
    if asked.tokens < 2 or (windows is not None and windows < 1):
        raise ParedError(
            f"text {text.name!r}: cannot cut {windows} windows of {asked.tokens} tokens; "
            "expected at least 1 window of at least 2 tokens"
        )
    encoded = tokenizer(text.joined, add_special_tokens=False, verbose=False)
    ids = torch.tensor(encoded["input_ids"], dtype=torch.int64)
    length = asked.within_text(len(ids), text.name)
    if sampling == "random-offset":
        random = torch.Generator().manual_seed(seed)
        count = windows or len(ids) // length
        starts = torch.randint(0, len(ids) - length + 1, (count,), generator=random).tolist()
    else:
        step = length if stride is None else stride
        if not 1 <= step <= length:
            raise ParedError(f"text {text.name!r}: windows of {length} tokens that begin every {step}; expected 1 to "
                             f"{length}")  # fmt: skip
        available = (len(ids) - length) // step + 1
        if windows is not None and windows > available:
            log.warning(
                "text %r has only %d of the %d windows of %d tokens requested",
                text.name,
                available,
                windows,
                length,
            )
        count = min(windows or available, available)
        order = torch.arange(available)
        if sampling == "shuffled":
            order = torch.randperm(available, generator=torch.Generator().manual_seed(seed))
        starts = (step * order[:count]).tolist()
    tokens = torch.stack([ids[start : start + length] for start in starts])
    spans = _characters(text, encoded, starts, length)
    return Windows(tokens, digest_of(tokens), text.name, text.origin, text.stand_in, whole=text.whole, spans=spans)


def _characters(text: Text, encoded: BatchEncoding, starts: Sequence[int], length: int) -> tuple[tuple[int, int], ...]:
    """Return the characters of the whole text that windows stand for, in proportion if the tokenizer cannot tell."""
    total, characters = len(encoded["input_ids"]), len(text.joined)
    exact = getattr(encoded, "is_fast", False)
    spans = []
    for start in starts:
        stop = start + length
        first, last = start * characters // total, -(-stop * characters // total)
        if exact:
            first, last = encoded.token_to_chars(start).start, encoded.token_to_chars(stop - 1).end
        spans.append((text.start + first, text.start + last))
    return tuple(spans)


def require_fits(config: PretrainedConfig, windows: Windows) -> None:
    """Check that a model can take these windows.

    Raises:
        ParedError: they are longer than the model has positions, or hold tokens it does not know.
    """
    text_config, positions = config.get_text_config(), positions_of(config)
    if positions is not None and windows.tokens.shape[1] > positions:
        raise too_long(windows.tokens.shape[1], positions)
    vocabulary, largest = getattr(text_config, "vocab_size", None), int(windows.tokens.max())
    if isinstance(vocabulary, int) and largest >= vocabulary:
        raise ParedError(
            f"text {windows.text!r} has token {largest}, but this model knows {vocabulary}; the tokenizer is another "
            "model's"
        )


def digest_of(*tensors: torch.Tensor | None) -> str:
    """Return the SHA-256 of tokens, and what comes with them if anything does, as little-endian int64."""
    digest = hashlib.sha256()
    for tensor in tensors:
        if tensor is not None:
            digest.update(tensor.contiguous().numpy().astype("<i8").tobytes())
    return digest.hexdigest()


def merged(spans: Iterable[Sequence[int]]) -> list[tuple[int, int]]:
    """Return spans in order, those that overlap or have at most a blank between them as one."""
    found: list[tuple[int, int]] = []
    for start, stop in sorted((int(span[0]), int(span[1])) for span in spans):
        if found and start <= found[-1][1] + 1:
            found[-1] = (found[-1][0], max(stop, found[-1][1]))
        else:
            found.append((start, stop))
    return found


def padded(rows: Sequence[Sequence[int]], padding: int) -> torch.Tensor:
    """Return rows of unequal length as one int64 tensor, filled up on the right."""
    longest = max(map(len, rows))
    return torch.tensor([[*row, *[padding] * (longest - len(row))] for row in rows], dtype=torch.int64)
