"""Texts by name: the embedded one, well-known corpora, the user's files, anything the datasets library has."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pared.errors import ParedError
from pared.names import did_you_mean
from pared.sources.data_sets import ALPACA
from pared.sources.files import data_file, data_folder, read_rows, read_text
from pared.sources.hub import HubSet
from pared.sources.templates import prompt

EMBEDDED_SHARE = 0.8  # of pydoc_data.topics is for calibration, the rest for evaluation
BLANK_LINES = "\n\n"


@dataclass(frozen=True)
class Text:
    """A named text: its documents, how they are joined, and where they really came from.

    Attributes:
        name: what the user called it.
        documents: the rows, in order.
        origin: the file, package or Hub data set they were read from, for the manifest.
        stand_in: true for the embedded text, which only stands in for a real corpus.
    """

    name: str
    documents: tuple[str, ...]
    origin: str
    stand_in: bool = False

    @property
    def joined(self) -> str:
        """The documents joined by blank lines, as the papers' perplexity protocols do."""
        return BLANK_LINES.join(self.documents)


@dataclass(frozen=True)
class _Corpus:
    """A well-known corpus: its file under ``PARED_DATA``, how rows lie in it, and its place on the Hub, if any."""

    file: str
    hub: HubSet | None  # whose rows have a ``text``
    layout: Literal["documents", "wikitext", "sentences"] = "documents"


def _wikitext(file: str, split: str) -> _Corpus:
    hub = HubSet("Salesforce/wikitext", "wikitext-2-raw-v1", split)
    return _Corpus(f"lm/wikitext2_raw_{file}.txt", hub, layout="wikitext")


def _ptb(file: str) -> _Corpus:
    """Penn Treebank as Mikolov prepared it, a sentence a line; not free, so that users bring the file themselves."""
    return _Corpus(f"lm/ptb.{file}.txt", None, layout="sentences")


CORPORA = {
    "wikitext2:train": _wikitext("train_part", "train"),
    "wikitext2:validation": _wikitext("valid", "validation"),
    "wikitext2:test": _wikitext("test", "test"),
    "ptb:train": _ptb("train"),
    "ptb:validation": _ptb("valid"),
    "ptb:test": _ptb("test"),
    "c4:train": _Corpus("lm/c4_truncated_1480.jsonl", HubSet("allenai/c4", file="en/c4-train.00000-of-01024.json.gz")),
    "c4:validation": _Corpus(
        "lm/c4_demo_300.jsonl", HubSet("allenai/c4", file="en/c4-validation.00000-of-00008.json.gz")
    ),
    "alpaca": _Corpus(ALPACA.file, ALPACA.hub),
}
HELD_OUT = {
    "embedded": "embedded:eval",
    "wikitext2:train": "wikitext2:test",
    "wikitext2:validation": "wikitext2:test",
    "c4:train": "c4:validation",
    "ptb:train": "ptb:test",
    "ptb:validation": "ptb:test",
}


def held_out(name: str) -> str | None:
    """Return the name of the text that calibration on ``name`` never sees; None if none is known."""
    return HELD_OUT.get(name)


def find_text(name: str, evaluation: bool = False) -> Text:
    """Find a text by name.

    Args:
        name: ``embedded``, ``wikitext2:train|validation|test``, ``ptb:train|validation|test``, ``c4:train|validation``,
            ``alpaca``, ``file:PATH`` (.txt, .jsonl with a ``text`` field, .gz of both) or ``NAME:SPLIT:FIELD`` of the
            datasets library (``NAME[CONFIG]:SPLIT:FIELD`` with a configuration).
        evaluation: ``embedded`` has two parts; true takes the one that is never calibrated on.

    Raises:
        ParedError: nothing of that name, unreadable, or empty.
    """
    if name == "embedded" or name.startswith("embedded:"):
        text = _embedded("embedded:eval" if name == "embedded" and evaluation else name)
    elif name.startswith("file:"):
        path = Path(name.removeprefix("file:")).expanduser()
        text = Text(name, tuple(read_documents(path)), str(path))
    elif name in CORPORA:
        text = _corpus(name)
    elif name.count(":") == 2:
        dataset, split, field = name.split(":")
        repository, _, config = dataset.removesuffix("]").partition("[")
        text = _from_hub(name, HubSet(repository, config or None, split), field)
    else:
        raise ParedError(
            f"unknown text {name!r}; {did_you_mean(name, ['embedded', *CORPORA])}, file:PATH, NAME:SPLIT:FIELD"
        )
    if not text.joined.strip():
        raise ParedError(f"text {name!r} ({text.origin}) is empty")
    return text


def read_documents(path: Path) -> list[str]:
    """Read a .txt file as one document, or a .jsonl file as one document a row; both may be gzipped.

    Raises:
        ParedError: another kind of file, missing, not UTF-8, not JSON, or a row without ``text``; names the file and
            the row.
    """
    kind = path.with_suffix("").suffix if path.suffix == ".gz" else path.suffix
    if kind not in (".txt", ".jsonl"):
        raise ParedError(
            f"text file {path}: expected .txt or .jsonl (or .gz of both), found {path.suffix or 'no suffix'}"
        )
    if kind == ".txt":
        return [read_text(path, "text file")]
    return [_row_text(path, number, row) for number, row in read_rows(path, "text file")]


def _row_text(path: Path, number: int, row: Any) -> str:
    if isinstance(row, dict) and isinstance(row.get("text"), str):
        return row["text"]
    if isinstance(row, dict) and {"instruction", "input", "output"} <= row.keys():
        return alpaca_text(row)
    found = sorted(row) if isinstance(row, dict) else type(row).__name__
    raise ParedError(f"{path}, row {number}: expected an object whose 'text' field is a string, found {found}")


def alpaca_text(row: dict[str, str]) -> str:
    """Return the ``text`` field of the Alpaca data: the instruction prompt, and its answer on the line behind it."""
    return prompt("alpaca", row["instruction"], row["input"]) + "\n" + row["output"]


def wikitext_rows(content: str) -> tuple[str, ...]:
    """Return the rows of the WikiText data set from its file: a line of one blank is the empty row."""
    lines = content.split("\n")
    if lines and lines[-1] == "":
        lines.pop()
    return tuple("" if line == " " else line + "\n" for line in lines)


def _embedded(name: str) -> Text:
    from pydoc_data import topics

    part = name.partition(":")[2] or "calibration"
    if part not in ("calibration", "eval"):
        raise ParedError(f"unknown text {name!r}; {did_you_mean(name, ['embedded:calibration', 'embedded:eval'])}")
    documents = [topics.topics[key] for key in sorted(topics.topics)]
    # Whole topics on either side of the cut: no document is half calibrated on, half evaluated on.
    cut, seen, total = 0, 0, sum(map(len, documents))
    while seen < EMBEDDED_SHARE * total:
        seen += len(documents[cut])
        cut += 1
    kept = documents[:cut] if part == "calibration" else documents[cut:]
    return Text(name, tuple(kept), "pydoc_data.topics of the Python standard library", stand_in=True)


def _corpus(name: str) -> Text:
    corpus = CORPORA[name]
    if corpus.hub is not None and data_folder() is None:
        return _from_hub(name, corpus.hub, "text")
    path = data_file(corpus.file, f"text {name!r}", "use file:PATH" if corpus.hub is None else None)
    documents = read_documents(path)
    if corpus.layout == "wikitext":
        documents = [*wikitext_rows(documents[0])]
    elif corpus.layout == "sentences":
        documents = [line.strip() for line in documents[0].split("\n") if line.strip()]
    return Text(name, tuple(documents), str(path))


def _from_hub(name: str, where: HubSet, field: str) -> Text:
    return Text(name, tuple(str(row[field]) for _, row in where.rows(field)), str(where))
