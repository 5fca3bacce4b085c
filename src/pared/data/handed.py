"""Texts that Python callers pass in as they are: a list of strings, or a data set with a text in every row."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pared.data.documents import document_of
from pared.data.texts import Text
from pared.errors import ParedError
from pared.names import PASSED_IN

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

EXPECTED = "the name of a text, a list of strings, or a datasets.Dataset with a 'text' in every row"


def text_of(data: Any, tokenizer: "PreTrainedTokenizerBase | None", function: str) -> Text:
    """Return documents that were passed in as a text.

    Args:
        data: a list of strings, or rows as a .jsonl file has them: ``text``, ``instruction`` and ``output``, or
            ``messages``; a ``datasets.Dataset`` is a sequence of such rows.
        tokenizer: of the model, whose chat template makes a text of a conversation.
        function: that the data was handed to, for messages.

    Raises:
        ParedError: something else, a row without a text, or no text at all.
    """
    kind = type(data).__name__
    if isinstance(data, Mapping):
        splits = ", ".join(map(repr, list(data)[:4]))
        raise ParedError(f"{function}: expected {EXPECTED} as data, got a {kind} of {splits}; name one of its parts")
    rows = _rows(data)
    if rows is None:
        raise ParedError(f"{function}: expected {EXPECTED} as data, got {_brief(data)}")
    documents = tuple(
        row if isinstance(row, str) else document_of(f"{function}: data, row {number}", row, tokenizer)
        for number, row in enumerate(rows)
    )
    if not any(document.strip() for document in documents):
        raise ParedError(f"{function}: data has no text; got {len(documents)} empty rows")
    return Text(PASSED_IN, documents, f"{len(documents):,} texts passed in Python")


def _rows(data: Any) -> Sequence[Any] | None:
    """Return the rows of a list or a data set, None of anything else: a text of letters, or a stream without end."""
    if isinstance(data, (list, tuple)):
        return data
    if isinstance(data, (str, bytes)) or not (hasattr(data, "__len__") and hasattr(data, "column_names")):
        return None
    return data


def _brief(data: Any) -> str:
    plain = data is None or isinstance(data, (bool, int, float, bytes))
    return repr(data)[:60] if plain else f"a {type(data).__name__}"
