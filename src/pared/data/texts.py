"""Texts by name: the embedded one, well-known corpora, the user's files, anything the datasets library has."""

import hashlib
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, TypeVar

from pared.data.chat import messages_of, rendered
from pared.data.corpora import CORPORA, HELD_OUT, STDLIB, python_source
from pared.data.cutting import BLANK_LINES, cut_in_two
from pared.data.documents import SUFFIXES, read_documents, require_file, suffix_of
from pared.data.hub import HubSet
from pared.errors import ParedError, TextTooShortError, UnreachableError
from pared.io.digests import file_digest
from pared.io.files import path_of
from pared.names import PART, did_you_mean

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)
_HANDED: ContextVar[Mapping[str, "Text"]] = ContextVar("texts of Python callers", default=MappingProxyType({}))
Made = TypeVar("Made")

EMBEDDED_SHARE = 0.8  # of pydoc_data.topics is for calibration, the rest for evaluation
KEPT_APART = 0.2  # of a file, at its end, if perplexity is to be measured on what is not calibrated on


@dataclass(frozen=True)
class Text:
    """A named text: its documents, how they are joined, and where they really came from.

    Attributes:
        name: what the user called it.
        documents: the rows, in order.
        origin: the file, package or Hub data set they were read from, for the manifest.
        stand_in: true for the embedded text, which only stands in for a real corpus.
        start: of a part of a text, the character of the whole that it begins at.
        part_of: of a part, the SHA-256 of the whole; empty for a whole text.
    """

    name: str
    documents: tuple[str, ...]
    origin: str
    stand_in: bool = False
    start: int = 0
    part_of: str = ""

    @property
    def joined(self) -> str:
        """The documents joined by blank lines, as the papers' perplexity protocols do."""
        return BLANK_LINES.join(self.documents)

    @property
    def whole(self) -> str:
        """The SHA-256 of the whole text, of which this may be a part."""
        return self.part_of or hashlib.sha256(self.joined.encode()).hexdigest()

    def split(self, share: float) -> tuple["Text", "Text"] | None:
        """Cut the text in two at the end of a document; where none is near, at a blank line, a line's end or a blank.

        Args:
            share: of the characters that the first part has, as nearly as can be.

        Returns:
            Both parts, ``NAME[:80%]`` and ``NAME[80%:]``; None if one of them would be empty.
        """
        if (parts := cut_in_two(self.documents, share)) is None:
            return None
        first, second, start = parts
        return (
            replace(self, name=f"{self.name}[:{share:.0%}]", documents=first, part_of=self.whole),
            replace(self, name=f"{self.name}[{share:.0%}:]", documents=second, start=self.start + start,
                    part_of=self.whole),
        )  # fmt: skip


EMBEDDED_PARTS = ("calibration", "eval")


def held_out(name: str) -> str | None:
    """Return the name of the text that calibration on ``name`` never sees; None if none is known.

    Of a file it is the last fifth, which calibration leaves alone then; see :func:`learned_part`.
    """
    if name.startswith("file:") and PART.search(name) is None:
        return f"{name}[{1 - KEPT_APART:.0%}:]"
    return HELD_OUT.get(name)


def learned_part(name: str, evaluated: str | None) -> str:
    """Return the name of what is learned from: of a file whose last fifth is evaluated on, what is before that.

    However the two names spell where the file lies, and of a copy of it too.
    """
    apart = held_out(name) if name.startswith("file:") else None
    if apart is None or evaluated is None:
        return name
    own, other = PART.search(apart), PART.search(evaluated)
    if own is None or other is None or own.group() != other.group() or not evaluated.startswith("file:"):
        return name
    same = _same_file(_path(name), _path(evaluated[: other.start()]))
    return f"{name}[:{1 - KEPT_APART:.0%}]" if same else name


def _same_file(one: Path, other: Path) -> bool:
    """Whether two paths lead to one file, or to copies of one."""
    if one.resolve() == other.resolve():
        return True
    with suppress(OSError):
        return one.stat().st_size == other.stat().st_size and file_digest(one) == file_digest(other)
    return False


def from_learned_part(name: str, evaluated: str | None, make: Callable[[str], Made]) -> Made:
    """Make something of what is learned from; of a file that is too short to keep a part of it apart, of all of it.

    Args:
        name: of a text.
        evaluated: the name of what perplexity is measured on, None for nothing.
        make: of a name; windows, say.

    Raises:
        ParedError: the text is unknown or cannot be read.
        TextTooShortError: all of it is too short.
    """
    part = learned_part(name, evaluated)
    try:
        return make(part)
    except TextTooShortError:
        if part == name:
            raise
    whole = make(name)
    log.warning("text %r is too short to keep a part apart to measure on: all of it is learned from", name)
    return whole


@contextmanager
def handed_over(text: Text | None) -> Iterator[None]:
    """Let a text that a Python caller passed in be found by its name while the context lasts.

    Args:
        text: with a name that no other text has; none for nothing.
    """
    token = _HANDED.set(_HANDED.get() if text is None else {**_HANDED.get(), text.name: text})
    try:
        yield
    finally:
        _HANDED.reset(token)


def find_text(name: str, evaluation: bool = False, tokenizer: "PreTrainedTokenizerBase | None" = None) -> Text:
    """Find a text by name.

    Args:
        name: ``embedded``, ``wikitext2:train|validation|test``, ``ptb:train|validation|test``, ``c4:train|validation``,
            ``alpaca``, ``alpaca:chat``, ``gsm8k:train|test``, ``codeparrot:train|test``, ``ultrachat:train|test``,
            ``stdlib:train|test`` (source of Python's standard library), ``file:PATH`` (.txt, .jsonl with a ``text``
            field or ``messages``, .gz of both), a part of that, ``file:PATH[:80%]`` or ``file:PATH[80%:]``, or
            ``NAME:SPLIT:FIELD`` of the datasets library (``NAME[CONFIG]:SPLIT:FIELD`` with a configuration).
        evaluation: ``embedded`` has two parts; true takes the one that is never calibrated on.
        tokenizer: of the model, whose chat template makes a text of a conversation.

    Raises:
        ParedError: nothing of that name, unreadable, or empty.
    """
    require_text(name, evaluation)
    try:
        text = _found(name, evaluation, tokenizer)
    except UnreachableError as error:
        raise UnreachableError(f"{error}; or give a text of your own in place of {name!r}: file:PATH") from None
    if not text.joined.strip():
        raise ParedError(f"text {name!r} ({text.origin}) is empty")
    return text


def _found(name: str, evaluation: bool, tokenizer: "PreTrainedTokenizerBase | None") -> Text:
    if name in _HANDED.get():
        return _HANDED.get()[name]
    if name == "embedded" or name.startswith("embedded:"):
        return _embedded("embedded:eval" if name == "embedded" and evaluation else name)
    if (part := _part(name)) is not None:
        return _part_of_file(name, part, tokenizer)
    if name.startswith("file:"):
        return _file(name, tokenizer)
    if name in STDLIB:
        modules, origin = python_source(name)
        return Text(name, tuple(modules), origin, stand_in=True)
    if name in CORPORA:
        documents, origin = CORPORA[name].read(name, tokenizer)
        return Text(name, tuple(documents), origin)
    dataset, split, field = name.split(":")
    repository, _, config = dataset.removesuffix("]").partition("[")
    return _from_hub(name, HubSet(repository, config or None, split), field, tokenizer)


def require_text(name: str, evaluation: bool = False) -> None:
    """Check that a name is one of a text, without reading it.

    Args:
        name: of a text.
        evaluation: whether it is measured on, not learned from: which part of a corpus is offered where none is named.

    Raises:
        ParedError: nothing of that name; offers what it may have been meant for.
    """
    if name == "embedded" or name in CORPORA or name in STDLIB or name in _HANDED.get():
        return
    if name.startswith("embedded:"):
        if name.partition(":")[2] not in EMBEDDED_PARTS:
            raise ParedError(
                f"unknown text {name!r}; {did_you_mean(name, [f'embedded:{one}' for one in EMBEDDED_PARTS])}"
            )
        return
    if name.startswith("file:"):
        part = _part(name)
        require_file(_path(name if part is None else part["text"]))
        return
    if name.count(":") == 2 and all(name.split(":")):
        return
    path = path_of(name)
    if suffix_of(path) in SUFFIXES or (os.path.isfile(path) and not name.isspace()):
        there = "" if os.path.isfile(path) else " (no such file is there)"
        raise ParedError(f"unknown text {name!r}; did you mean 'file:{name}'{there}?")
    parts = [f"{name.strip()}:{part}" for part in (("test", "validation") if evaluation else ("train",))]
    meant = next((part for part in parts if part in CORPORA), name)  # a corpus without its part
    valid = did_you_mean(meant, ["embedded", *STDLIB, *CORPORA])
    raise ParedError(f"unknown text {name[:80]!r}; {valid}, file:PATH, NAME:SPLIT:FIELD")


def _path(name: str) -> Path:
    return path_of(name.removeprefix("file:"))


def _part(name: str) -> Mapping[str, str] | None:
    """Return what a name says of a part of a file, None if it names a whole one, brackets and all."""
    found = PART.search(name)
    if found is None or os.path.isfile(_path(name)):
        return None
    return {**found.groupdict(), "text": name[: found.start()]}


def _file(name: str, tokenizer: "PreTrainedTokenizerBase | None") -> Text:
    path = _path(name)
    require_file(path)
    return Text(name, tuple(read_documents(path, tokenizer)), str(path))


def _part_of_file(name: str, part: Mapping[str, str], tokenizer: "PreTrainedTokenizerBase | None") -> Text:
    text = _file(part["text"], tokenizer)
    if not text.joined.strip():
        raise ParedError(f"text {part['text']!r} ({text.origin}) is empty")
    parts = text.split(int(part["until"] or part["since"]) / 100)
    if parts is None:
        raise TextTooShortError(f"text {part['text']!r} is too short to keep a part of it apart")
    return replace(parts[0] if part["until"] else parts[1], name=name)


def _embedded(name: str) -> Text:
    from pydoc_data import topics

    part = name.partition(":")[2] or "calibration"
    documents = [topics.topics[key] for key in sorted(topics.topics)]
    # Whole topics on either side of the cut: no document is half calibrated on, half evaluated on.
    cut, seen, total = 0, 0, sum(map(len, documents))
    while seen < EMBEDDED_SHARE * total:
        seen += len(documents[cut])
        cut += 1
    text = Text(name, tuple(documents), "pydoc_data.topics of the Python standard library", stand_in=True)
    if part == "calibration":
        return replace(text, documents=text.documents[:cut], part_of=text.whole)
    start = len(BLANK_LINES.join(documents[:cut])) + len(BLANK_LINES)
    return replace(text, documents=text.documents[cut:], start=start, part_of=text.whole)


def _from_hub(name: str, where: HubSet, field: str, tokenizer: "PreTrainedTokenizerBase | None") -> Text:
    def documents() -> Iterator[str]:
        for which, row in where.rows(field):
            if isinstance(row[field], str):
                yield row[field]
            elif isinstance(row[field], list):
                yield rendered(which, messages_of(which, {"messages": row[field]}), tokenizer)
            else:
                raise ParedError(f"{which}: expected {field!r} to be a string, got {row[field]!r:.60}")

    return Text(name, tuple(documents()), str(where))
