"""What a model reads: texts and labelled examples by name, and windows cut of them."""

from typing import TYPE_CHECKING

from pared.lazy import lazy_package

if TYPE_CHECKING:
    from pared.data.encoding import cut_examples, find_windows
    from pared.data.examples import Examples
    from pared.data.labelled import find_examples, is_labelled
    from pared.data.texts import Text, find_text
    from pared.data.windows import Windows, cut

__all__ = [
    "Examples",
    "Text",
    "Windows",
    "cut",
    "cut_examples",
    "find_examples",
    "find_text",
    "find_windows",
    "is_labelled",
]

lazy_package(
    __name__,
    {
        "pared.data.encoding": ["cut_examples", "find_windows"],
        "pared.data.examples": ["Examples"],
        "pared.data.labelled": ["find_examples", "is_labelled"],
        "pared.data.texts": ["Text", "find_text"],
        "pared.data.windows": ["Windows", "cut"],
    },
)
