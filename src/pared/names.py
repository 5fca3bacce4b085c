"""Names: the one helper behind every pattern and every 'did you mean', and what messages call a field."""

import difflib
import fnmatch
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from pared.errors import ParedError

PASSED_IN = "python:data"  # names a text that was passed in from Python, in a recipe or a manifest
# What stands behind the name of a file where only a part of it is meant: file:words.txt[:80%], file:words.txt[80%:].
PART = re.compile(r"\[(?::(?P<until>\d\d?)%|(?P<since>\d\d?)%:)\]$")


# Fields whose option has another name than the field, by their dotted names.
OPTIONS = {"calibration.text": "data", "evaluation.text": "eval", "evaluation.length": "eval-length",
           "options": "option", "allocation_options": "allocation-option"}  # fmt: skip

_FLAGS: ContextVar[bool] = ContextVar("flags", default=False)


@contextmanager
def told_in_flags() -> Iterator[None]:
    """Have messages call fields what the command line calls them, for the length of a ``with`` block."""
    before = _FLAGS.set(True)
    try:
        yield
    finally:
        _FLAGS.reset(before)


def is_told_in_flags() -> bool:
    """Whether messages are read by who gave a command."""
    return _FLAGS.get()


def called(field: str, value: str = "") -> str:
    """Return what a field is called where a message is read: ``stride=8`` in Python, ``--stride 8`` by a command.

    Args:
        field: its name in Python; of a section its dotted name.
        value: that is to be given, if it is to be said; of a switch ``True``.
    """
    if not _FLAGS.get():
        return f"{field}={value}" if value else field
    flag = f"--{OPTIONS.get(field) or field.replace('_', '-')}"
    return f"{flag} {value}" if value and value != "True" else flag


def ways_on() -> str:
    """Return what may be done about unfinished work: take it up, or start over."""
    if _FLAGS.get():
        return "--resume continues it, --restart removes it and starts over"
    return "resume=True continues it, resume=False removes it and starts over"


def anew() -> str:
    """Return how a run starts over where unfinished work lies."""
    return "--restart" if _FLAGS.get() else "resume=False"


def option_called(name: str, value: str, of: str = "options") -> str:
    """Return how an option of a method is given: ``options={'new': 8}`` in Python, ``--option new=8`` by a command.

    Args:
        name: of the option.
        value: as Python writes it; of a text without its quotes.
        of: the field that holds it: ``options`` or ``allocation_options``.
    """
    if _FLAGS.get():
        return called(of, f"{name}={value}")
    written = value if value.replace(".", "").isdigit() else repr(value)
    return f"{of}={{{name!r}: {written}}}"


def text_called(name: str) -> str:
    """Return what a text is called in a message: by its name, if a user gave it one."""
    return "the data passed in Python" if name == PASSED_IN else f"text {name!r}"


def with_article(noun: str) -> str:
    """Return a noun behind its indefinite article: ``an int``."""
    return f"{'an' if noun[:1].lower() in tuple('aeiou') else 'a'} {noun}"


def did_you_mean(found: str, valid: Iterable[str]) -> str:
    """Return the tail of an error message: the nearest valid name, then all of them."""
    valid = sorted(valid)
    near = difflib.get_close_matches(found, valid, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return f"{hint}Valid: {', '.join(valid)}"


def require_known(what: str, found: str, valid: Iterable[str]) -> None:
    """Refuse a name that is none of the valid ones.

    Args:
        what: the names are of, in the singular.
        found: the name.
        valid: all there are.

    Raises:
        ParedError: it is unknown; offers the nearest.
    """
    valid = list(valid)
    if found not in valid:
        raise ParedError(f"unknown {what} {found!r}; {did_you_mean(found, valid)}")


def match(patterns: Iterable[str], names: Iterable[str]) -> set[str]:
    """Return the names that fit any of the shell-style patterns (``*.0.*``, ``*q_proj``).

    Raises:
        ParedError: a pattern matches nothing; a skip that skips nothing is a mistake.
    """
    names = list(names)
    matched: set[str] = set()
    for pattern in patterns:
        hits = set(fnmatch.filter(names, pattern))
        if not hits:
            wider = f"*{pattern.strip('*.')}*"
            valid = f"did you mean {wider!r}?" if fnmatch.filter(names, wider) else _some_of(pattern, names)
            raise ParedError(f"pattern {pattern!r} matches none of the {len(names)} sites; {valid}")
        matched |= hits
    return matched


def _some_of(pattern: str, names: list[str]) -> str:
    """Return the tail of an error message on a pattern: the name nearest to it, and the first few of all."""
    near = difflib.get_close_matches(pattern.strip("*."), {name.rpartition(".")[2] for name in names}, n=1, cutoff=0.6)
    hint = f"did you mean '*{near[0]}'? " if near else ""
    more = f" and {len(names) - 12} more" if len(names) > 12 else ""
    return f"{hint}Sites: {', '.join(names[:12])}{more}"
