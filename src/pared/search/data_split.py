"""The text a search may look at: the end of the training text, neither calibrated on nor tested on."""

import re
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from pared.data.corpora import CORPORA, HELD_OUT
from pared.data.files import data_folder
from pared.data.texts import Text, find_text
from pared.errors import ParedError
from pared.io.files import path_of

SHARE = 0.2  # of the training text
HELD_OUT_NAME = re.compile(r"test|valid|dev|eval", re.IGNORECASE)


def search_texts(name: str, tokenizer: PreTrainedTokenizerBase | None = None) -> tuple[Text, Text]:
    """Return the calibration part of a training text, its first 80%, and the search part, the rest; whole documents.

    A text of one document is cut at a blank line, at the end of a line, or else at a blank.

    Args:
        name: of a training text, as :func:`pared.data.texts.find_text` knows it.
        tokenizer: of the model, whose chat template makes a text of a conversation.

    Raises:
        ParedError: it is a split that results are reported on, unknown, or cannot be cut.
    """
    require_training(name)
    text = find_text(name, tokenizer=tokenizer)
    parts = text.split(1 - SHARE)
    if parts is None:
        raise ParedError(f"text {name!r} ({text.origin}) cannot be cut in a calibration and a search part; name a "
                         "longer one")  # fmt: skip
    return parts


def require_training(name: str) -> None:
    """Refuse a split that results are reported on.

    Raises:
        ParedError: the text is one; says which to name.
    """
    rest = name.partition(":")[2]
    of_file = name.startswith("file:")
    split = "" if of_file else rest.rpartition(":")[0] or rest
    local = of_file and path_of(rest).resolve() in _held_out_files()
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
