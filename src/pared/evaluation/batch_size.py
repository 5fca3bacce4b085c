"""How many rows go through a model at a time: so many, or as many as there is memory for.

What is computed of a row does not depend on the others: a batch is a matter of memory and time.
"""

import gc
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Literal, TypeVar

import torch
from transformers import PreTrainedModel

from pared.memory import available_memory, lacks_memory

MOST = 64  # rows of a batch that is found; more are hardly faster
SHARE = 0.5  # of the memory that is free
Row = TypeVar("Row")
Found = TypeVar("Found")
log = logging.getLogger(__name__)


class BatchSize:
    """A number of rows, or one that is found: what shapes say fits, halved where memory does not suffice after all.

    Attributes:
        now: rows of the next batch.
        is_found: whether it may change.
    """

    def __init__(self, asked: int | Literal["auto"]) -> None:
        self.is_found = asked == "auto"
        self.now = MOST if asked == "auto" else asked

    @classmethod
    def of(cls, asked: "int | Literal['auto'] | BatchSize") -> "BatchSize":
        """Return what was asked for as a batch size, one that is one already as it is."""
        return asked if isinstance(asked, BatchSize) else cls(asked)

    def fit(self, model: PreTrainedModel, tokens: int, samples: int = 1) -> None:
        """Lower a size that is found to what memory holds of rows of so many tokens.

        Args:
            model: that is to read them, where it is to run.
            tokens: of the longest row, with those that are written.
            samples: how often every row is in the batch.
        """
        free = _free_memory(model.get_input_embeddings().weight.device) if self.is_found else None
        if free is not None:
            self.now = max(1, min(self.now, int(SHARE * free) // (samples * row_bytes(model, tokens))))

    def over(
        self, rows: Sequence[Row], work: Callable[[Sequence[Row]], Found]
    ) -> Iterator[tuple[Sequence[Row], Found]]:
        """Yield the rows of every batch, and what was made of them.

        Args:
            rows: the longest last; where the size is found they are taken from the end, as what fits it fits all.
            work: on a batch.

        Raises:
            Exception: whatever the work raises; a lack of memory of one row, or where the size is given.
        """
        if self.is_found:  # half of what there is no rows for would be the same batch again
            rows, self.now = rows[::-1], max(1, min(self.now, len(rows)))
        start = 0
        while start < len(rows):
            found = self.attempt(lambda size, start=start: work(rows[start : start + size]))  # type: ignore[misc]
            yield rows[start : start + self.now], found
            start += self.now

    def attempt(self, work: Callable[[int], Found]) -> Found:
        """Return what work with batches of this size gives; with smaller ones, where memory does not suffice.

        Raises:
            Exception: as :meth:`over`.
        """
        while True:
            try:
                return work(self.now)
            except Exception as error:
                if not self.is_found or self.now == 1 or not lacks_memory(error):
                    raise
            self.now = -(-self.now // 2)  # outside: the error holds all that was computed
            log.info("out of memory: batches of %d rows from here on", self.now)
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()


def row_bytes(model: PreTrainedModel, tokens: int) -> int:
    """Return about how many bytes a row takes at most: logits and their logarithms, the cache, one block's work.

    Args:
        model: whose configuration says how wide it is.
        tokens: of the row.
    """
    config, item = model.config.get_text_config(), model.dtype.itemsize

    def wide(*names: str) -> int:
        return next((int(found) for name in names if isinstance(found := getattr(config, name, None), int)), 0)

    hidden, heads = wide("hidden_size", "n_embd"), wide("num_attention_heads", "n_head")
    inner = wide("intermediate_size", "ffn_dim", "n_inner") or 4 * hidden
    kept = wide("num_key_value_heads", "num_attention_heads", "n_head")
    cache = 2 * wide("num_hidden_layers", "n_layer") * kept * (wide("head_dim") or hidden // max(1, heads)) * item
    block = 4 * (8 * hidden + 3 * inner + heads * tokens)  # scores of attention among it
    head = wide("vocab_size") * (item + 8) if model.get_output_embeddings() is not None else 0
    return max(1, tokens * (cache + block + head))


def _free_memory(device: torch.device) -> int | None:
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    free = available_memory() if device.type == "cpu" else None
    return None if free is None else free.bytes
