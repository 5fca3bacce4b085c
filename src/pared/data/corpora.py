"""Well-known corpora by name: their file under ``PARED_DATA``, their place on the Hub, and how rows lie in them."""

import sysconfig
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pared.data.data_sets import ALPACA, GSM8K_TEST, GSM8K_TRAIN, DataSet
from pared.data.documents import document_of, read_documents
from pared.data.files import data_file, data_folder, read_text
from pared.data.hub import HubSet
from pared.errors import ParedError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Row = Mapping[str, Any]
OR_A_FILE = "use file:PATH"
SHORTEST = 2000  # characters of a module that is a document
# Parts of the standard library that are no usual source: tests, tables, other people's code, and the embedded text.
NOT_SOURCE = {"test", "tests", "idlelib", "lib2to3", "site-packages", "dist-packages", "encodings", "pydoc_data",
              "turtledemo", "ensurepip", "__pycache__", "__phello__"}  # fmt: skip


@dataclass(frozen=True)
class Corpus:
    """A well-known corpus.

    Attributes:
        file: under ``PARED_DATA``.
        hub: where it is read if that names no folder; its rows have a ``text``, unless ``document`` makes one.
        layout: of the file, where it has no rows that ``document`` is for.
        document: from a row, of the file or of the Hub, to one that holds a text, an instruction or a conversation; a
            row without the fields for that as it is, so that what is wrong with it is told where documents are read.
    """

    file: str
    hub: HubSet | None
    layout: Literal["documents", "wikitext", "sentences"] = "documents"
    document: Callable[[Row], Row] | None = None

    @property
    def is_there(self) -> bool:
        """Whether ``PARED_DATA`` names a folder that has the file."""
        folder = data_folder()
        return folder is not None and any((folder / name).is_file() for name in (self.file, f"{self.file}.gz"))

    def read(self, name: str, tokenizer: "PreTrainedTokenizerBase | None") -> tuple[list[str], str]:
        """Return the documents, and where they were read from.

        Args:
            name: of the corpus, for messages.
            tokenizer: of the model, whose chat template makes a text of a conversation.

        Raises:
            ParedError: it cannot be read, or a row holds no text; names file or data set, and the row.
        """
        what = f"text {name!r}"
        if self.hub is not None and (self.document is not None or data_folder() is None):
            make = self.document or _as_it_is
            rows = DataSet(self.file, self.hub, () if self.document else ("text",))
            return [document_of(which, make(row), tokenizer) for which, row in rows.rows(what)], rows.origin(what)
        path = data_file(self.file, what, OR_A_FILE if self.hub is None else None)
        documents = read_documents(path)
        if self.layout == "wikitext":
            documents = [*wikitext_rows(documents[0])]
        elif self.layout == "sentences":
            documents = [line.strip() for line in documents[0].split("\n") if line.strip()]
        return documents, str(path)


def _as_it_is(row: Row) -> Row:
    return row


def _wikitext(file: str, split: str) -> Corpus:
    hub = HubSet("Salesforce/wikitext", "wikitext-2-raw-v1", split)
    return Corpus(f"lm/wikitext2_raw_{file}.txt", hub, layout="wikitext")


def _ptb(file: str) -> Corpus:
    """Penn Treebank as Mikolov prepared it, a sentence a line; not free, so that users bring the file themselves."""
    return Corpus(f"lm/ptb.{file}.txt", None, layout="sentences")


def _solved(row: Row) -> Row:
    """Return a question with its solution as one text, as prompts of GSM8K show examples."""
    asked, answer = row.get("question"), row.get("answer")
    both = isinstance(asked, str) and isinstance(answer, str)
    return {"text": f"Question: {asked}\nAnswer: {answer}"} if both else row


def _source(row: Row) -> Row:
    return {"text": row["content"]} if "content" in row else row


def _conversation(row: Row) -> Row:
    """Return an instruction of Alpaca as a conversation of two messages, without the prompt it was published with."""
    fields = [row.get(name) for name in ("instruction", "input", "output")]
    if not all(isinstance(field, str) for field in fields):
        return row
    asked, beside, answer = map(str, fields)
    question = f"{asked}\n\n{beside}" if beside else asked
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def _codeparrot(split: str, name: str) -> Corpus:
    hub = HubSet("codeparrot/codeparrot-clean-valid", split=split)
    return Corpus(f"code/codeparrot_{name}.jsonl", hub, document=_source)


def _ultrachat(split: str, name: str) -> Corpus:
    hub = HubSet("HuggingFaceH4/ultrachat_200k", split=split)
    return Corpus(f"instruct/ultrachat_{name}.jsonl", hub, document=_as_it_is)


CORPORA = {
    "wikitext2:train": _wikitext("train_part", "train"),
    "wikitext2:validation": _wikitext("valid", "validation"),
    "wikitext2:test": _wikitext("test", "test"),
    "ptb:train": _ptb("train"),
    "ptb:validation": _ptb("valid"),
    "ptb:test": _ptb("test"),
    "c4:train": Corpus("lm/c4_truncated_1480.jsonl", HubSet("allenai/c4", file="en/c4-train.00000-of-01024.json.gz")),
    "c4:validation": Corpus(
        "lm/c4_demo_300.jsonl", HubSet("allenai/c4", file="en/c4-validation.00000-of-00008.json.gz")
    ),
    "alpaca": Corpus(ALPACA.file, ALPACA.hub),
    "alpaca:chat": Corpus(ALPACA.file.removesuffix(".gz"), ALPACA.hub, document=_conversation),
    "gsm8k:train": Corpus(GSM8K_TRAIN.file.removesuffix(".gz"), GSM8K_TRAIN.hub, document=_solved),
    "gsm8k:test": Corpus(GSM8K_TEST.file, GSM8K_TEST.hub, document=_solved),
    # Parts of what is published: enough for thousands of windows, and read in seconds.
    "codeparrot:train": _codeparrot("train[:2048]", "train"),
    "codeparrot:test": _codeparrot("train[-512:]", "test"),
    "ultrachat:train": _ultrachat("train_sft[:2048]", "train"),
    "ultrachat:test": _ultrachat("test_sft[:512]", "test"),
}
STDLIB = ("stdlib:train", "stdlib:test")  # Python source that is on every machine
HELD_OUT = {
    "embedded": "embedded:eval",
    "stdlib:train": "stdlib:test",
    "wikitext2:train": "wikitext2:test",
    "wikitext2:validation": "wikitext2:test",
    "c4:train": "c4:validation",
    "ptb:train": "ptb:test",
    "ptb:validation": "ptb:test",
    "gsm8k:train": "gsm8k:test",
    "codeparrot:train": "codeparrot:test",
    "ultrachat:train": "ultrachat:test",
}


def wikitext_rows(content: str) -> tuple[str, ...]:
    """Return the rows of the WikiText data set from its file: a line of one blank is the empty row."""
    lines = content.split("\n")
    if lines and lines[-1] == "":
        lines.pop()
    return tuple("" if line == " " else line + "\n" for line in lines)


def python_source(name: str) -> tuple[list[str], str]:
    """Return every second module of Python's standard library, and where they lie.

    Args:
        name: one of :data:`STDLIB`; each has the modules that the other has not.

    Raises:
        ParedError: this Python has no source of it.
    """
    library = Path(sysconfig.get_path("stdlib"))
    paths = sorted(path for path in library.rglob("*.py") if not NOT_SOURCE & set(path.relative_to(library).parts))
    read = (read_text(path, "module") for path in paths)
    texts = list(dict.fromkeys(text for text in read if len(text) >= SHORTEST))  # Debian has some of them twice
    if len(texts) < len(STDLIB):
        raise ParedError(f"text {name!r}: no source of Python's standard library in {library}; {OR_A_FILE}")
    return texts[STDLIB.index(name) :: len(STDLIB)], f"the standard library of Python {sysconfig.get_python_version()}"
