"""What is trained on: rows of token ids with labels, and a part of them kept apart to measure the loss on."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from pared.data.encoding import find_windows
from pared.data.instructions import PREFIX, cut_instructions
from pared.data.lengths import Length
from pared.data.texts import from_learned_part
from pared.data.windows import NO_LABEL, Windows, merged, require_fits
from pared.errors import ParedError
from pared.names import called
from pared.schema.training import TrainingConfig

Row = dict[str, torch.Tensor]
PADDING = {"labels": NO_LABEL}  # everything else is padded with 0


@dataclass(frozen=True)
class Examples:
    """Rows to train on and rows never trained on.

    Attributes:
        train: one row a window or example, in the order of the data.
        validation: the last of every data set.
        described: what a manifest records of each data set.
    """

    train: tuple[Row, ...]
    validation: tuple[Row, ...]
    described: tuple[dict[str, object], ...]

    @property
    def tokens_per_row(self) -> float:
        """Tokens of a row, padding not counted, on the average."""
        return sum(tokens_of(row) for row in self.train) / len(self.train)


def find_rows(
    tuning: TrainingConfig,
    tokenizer: PreTrainedTokenizerBase,
    config: PretrainedConfig,
    causal: bool,
    evaluated: str | None = None,
) -> Examples:
    """Return the rows of all data sets a tuning names.

    Args:
        tuning: what is asked for.
        tokenizer: of the model.
        config: of the model.
        causal: whether it is a causal language model.
        evaluated: the name of what perplexity is measured on; of a file whose end that is the part before is read.

    Raises:
        ParedError: a name is unknown, a set is too short to keep a part apart, or the model cannot take its rows.
    """
    length = Length.of(tuning).within(config, "rows to train on")
    train: list[Row] = []
    validation: list[Row] = []
    described: list[dict[str, object]] = []
    for name in tuning.data:
        wanted = None if tuning.windows is None else tuning.windows + tuning.validation
        if name.startswith(PREFIX):
            windows = cut_instructions(name, tokenizer, length.tokens, wanted, tuning.template)
        else:
            windows = from_learned_part(
                name, evaluated, partial(find_windows, tokenizer=tokenizer, config=config, causal=causal,
                                         length=length, samples=wanted)
            )  # fmt: skip
            _require_labels(name, windows, config, causal)
        require_fits(config, windows)
        rows = rows_of(windows)
        if len(rows) <= tuning.validation:
            raise ParedError(
                f"data {name!r} has {len(rows)} windows of {windows.tokens.shape[1]} tokens, and {tuning.validation} "
                f"of them are kept apart for validation; nothing is left to train on: keep fewer apart "
                f"({called('validation')}) or give more {'rows' if name.startswith(PREFIX) else 'text'}"
            )
        cut = len(rows) - tuning.validation
        train += rows[:cut]
        validation += rows[cut:]
        told = windows.describe()
        if windows.spans:
            told["characters"] = [list(span) for span in merged(windows.spans[:cut])]
        described.append({**told, "trained_on": cut})
    return Examples(tuple(train), tuple(validation), tuple(described))


def _require_labels(name: str, windows: Windows, config: PretrainedConfig, causal: bool) -> None:
    """Refuse to train a classifier on text that has no labels."""
    if causal or windows.labels is not None:
        return
    named = ", ".join(config.architectures or [config.model_type])
    raise ParedError(
        f"data {name!r} is plain text, and {named} is not a language model that could learn it; name labelled "
        "examples: glue:TASK:train, ner:NAME:train, or file:PATH (.jsonl with 'text' and 'label')"
    )


def rows_of(windows: Windows) -> list[Row]:
    """Return one row a window, without the padding on its right; of a text the tokens are the labels."""
    labels = windows.tokens if windows.labels is None else windows.labels
    columns = {"input_ids": windows.tokens, **windows.beside, "labels": labels}
    rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    if windows.mask is None:
        return rows
    return [
        {name: value[:length] if value.ndim else value for name, value in row.items()}
        for row, length in zip(rows, windows.mask.sum(dim=1).tolist(), strict=True)
    ]


def tokens_of(row: Row) -> int:
    """Return the tokens of a row, padding not counted."""
    return int(row["attention_mask"].sum()) if "attention_mask" in row else len(row["input_ids"])


def collate(rows: Sequence[Row]) -> Row:
    """Stack rows; shorter ones are padded on the right, and all get a mask if any has one."""
    names = dict.fromkeys(name for row in rows for name in row)
    full: list[dict[str, Any]] = [{"attention_mask": torch.ones_like(row["input_ids"]), **row}
                                  if "attention_mask" in names else row for row in rows]  # fmt: skip
    return {name: _stacked([row[name] for row in full], PADDING.get(name, 0)) for name in full[0]}


def _stacked(values: Sequence[torch.Tensor], padding: int) -> torch.Tensor:
    if values[0].ndim == 0:
        return torch.stack(list(values))
    return torch.nn.utils.rnn.pad_sequence(list(values), batch_first=True, padding_value=padding)
