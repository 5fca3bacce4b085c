"""What the user names: models, texts and labelled examples."""

from typing import TYPE_CHECKING

from pared.lazy import lazy_package

if TYPE_CHECKING:
    from pared.sources.examples import Examples
    from pared.sources.labelled import find_examples, is_labelled
    from pared.sources.labelled_windows import cut_examples, find_windows
    from pared.sources.models import ModelSource, find_model
    from pared.sources.texts import Text, find_text
    from pared.sources.windows import Windows, cut

__all__ = [
    "Examples",
    "ModelSource",
    "Text",
    "Windows",
    "cut",
    "cut_examples",
    "find_examples",
    "find_model",
    "find_text",
    "find_windows",
    "is_labelled",
]

lazy_package(
    __name__,
    {
        "pared.sources.examples": ["Examples"],
        "pared.sources.labelled": ["find_examples", "is_labelled"],
        "pared.sources.labelled_windows": ["cut_examples", "find_windows"],
        "pared.sources.models": ["ModelSource", "find_model"],
        "pared.sources.texts": ["Text", "find_text"],
        "pared.sources.windows": ["Windows", "cut"],
    },
)
