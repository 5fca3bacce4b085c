"""Documents of the user's files: text, and rows of JSON that hold a text, a conversation or an instruction."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from pared.data.chat import is_conversation, messages_of, rendered
from pared.data.files import read_rows, read_text, require_there
from pared.data.templates import prompt
from pared.errors import ParedError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SUFFIXES = (".txt", ".jsonl")


def read_documents(path: Path, tokenizer: "PreTrainedTokenizerBase | None" = None) -> list[str]:
    """Read a .txt file as one document, or a .jsonl file as one document a row; both may be gzipped.

    Lines that end as on Windows end in a single newline then.

    Args:
        path: of the file.
        tokenizer: of the model, whose chat template makes a text of a conversation.

    Raises:
        ParedError: another kind of file, missing, not UTF-8, not JSON, or a row that has no text; names the file and
            the row.
    """
    _require_suffix(path)
    if suffix_of(path) == ".txt":
        return [read_text(path, "text file").replace("\r\n", "\n")]
    return [document_of(f"{path}, row {number}", row, tokenizer) for number, row in read_rows(path, "text file")]


def suffix_of(path: Path) -> str:
    """Return how a file is named, whether it is gzipped or not."""
    return path.with_suffix("").suffix if path.suffix == ".gz" else path.suffix


def _require_suffix(path: Path) -> None:
    if suffix_of(path) not in SUFFIXES:
        raise ParedError(
            f"text file {path}: expected .txt or .jsonl (or .gz of both), got {path.suffix or 'no suffix'}"
        )


def require_file(path: Path) -> None:
    """Check that a file of text is there, by its name.

    Raises:
        ParedError: it is not, or of another kind.
    """
    _require_suffix(path)
    require_there(path, "text file")


def document_of(which: str, row: Any, tokenizer: "PreTrainedTokenizerBase | None") -> str:
    """Return the document that a row holds: a text, an instruction with its answer, or a conversation.

    Args:
        which: row it is, for messages.
        row: a mapping with ``text``, with ``instruction`` and ``output``, or with ``messages``.
        tokenizer: of the model, whose chat template makes a text of a conversation.

    Raises:
        ParedError: the row holds none of them.
    """
    if isinstance(row, dict) and isinstance(row.get("text"), str):
        return row["text"]
    if isinstance(row, dict) and "text" not in row and {"instruction", "output"} <= row.keys():
        fields = {**row, "input": row.get("input") or ""}
        if all(isinstance(fields[field], str) for field in ("instruction", "input", "output")):
            return alpaca_text(fields)
    if is_conversation(row):
        return rendered(which, messages_of(which, row), tokenizer)
    raise ParedError(f"{which}: expected an object whose 'text' field is a string, got {_found(row)}; a conversation "
                     "is a list in 'messages'")  # fmt: skip


def _found(row: Any) -> str:
    """Say what a row that is no text holds."""
    if not isinstance(row, dict):
        return "null" if row is None else type(row).__name__
    strange = {field: row[field] for field in ("text", "instruction", "input", "output", "messages")
               if field in row}  # fmt: skip
    if not strange:
        return str(sorted(row))
    return ", ".join(f"{field!r} {'null' if value is None else repr(value)[:40]}" for field, value in strange.items())


def alpaca_text(row: dict[str, str]) -> str:
    """Return the ``text`` field of the Alpaca data: the instruction prompt, and its answer on the line behind it."""
    return prompt("alpaca", row["instruction"], row["input"]) + "\n" + row["output"]
