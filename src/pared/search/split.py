"""The text a search may look at: the end of the training text, neither calibrated on nor tested on."""

import re
from dataclasses import replace
from itertools import accumulate
from pathlib import Path

from pared.errors import ParedError
from pared.sources.files import data_folder
from pared.sources.texts import BLANK_LINES, CORPORA, HELD_OUT, Text, find_text

SHARE = 0.2  # of the training text
HELD_OUT_NAME = re.compile(r"test|valid|dev|eval", re.IGNORECASE)


def search_texts(name: str) -> tuple[Text, Text]:
    """Return the calibration part of a training text, its first 80%, and the search part, the rest; whole documents.

    A text of one document is cut at a blank line, at the end of a line, or else at a blank.

    Args:
        name: of a training text, as :func:`pared.sources.texts.find_text` knows it.

    Raises:
        ParedError: it is a split that results are reported on, unknown, or cannot be cut.
    """
    require_training(name)
    text = find_text(name)
    documents, glue = list(text.documents), BLANK_LINES
    for mark in (BLANK_LINES, "\n", " "):
        if len(documents) > 1:
            break
        documents, glue = text.documents[0].split(mark), mark
    ends = list(accumulate(map(len, documents)))
    cut = 1 + min(range(len(ends)), key=lambda at: abs(ends[at] - (1 - SHARE) * ends[-1]))
    cut = min(cut, len(documents) - 1)
    parts = documents[:cut], documents[cut:]
    if not all("".join(part).strip() for part in parts):
        raise ParedError(f"text {name!r} ({text.origin}) cannot be cut in a calibration and a search part; name a "
                         "longer one")  # fmt: skip
    calibration, search = (tuple(part) if len(text.documents) > 1 else (glue.join(part),) for part in parts)
    return (
        replace(text, name=f"{name}[:{1 - SHARE:.0%}]", documents=calibration),
        replace(text, name=f"{name}[{1 - SHARE:.0%}:]", documents=search),
    )


def require_training(name: str) -> None:
    """Refuse a split that results are reported on.

    Raises:
        ParedError: the text is one; says which to name.
    """
    rest = name.partition(":")[2]
    of_file = name.startswith("file:")
    split = "" if of_file else rest.rpartition(":")[0] or rest
    local = of_file and Path(rest).expanduser().resolve() in _held_out_files()
    if name in HELD_OUT.values() or HELD_OUT_NAME.search(split) or local:
        training = ", ".join(sorted(set(HELD_OUT) - set(HELD_OUT.values()) - {"wikitext2:validation"}))
        raise ParedError(
            f"text {name!r} is one that results are reported on, and a search must not see it; name a training text "
            f"({training}, file:PATH): the search takes its last {SHARE:.0%}"
        )


def _held_out_files() -> set[Path]:
    """Return the local copies of splits that results are reported on."""
    folder = data_folder()
    held_out = (corpus.file for name, corpus in CORPORA.items() if HELD_OUT_NAME.search(name.partition(":")[2]))
    return {(folder / file).resolve() for file in held_out} if folder else set()
