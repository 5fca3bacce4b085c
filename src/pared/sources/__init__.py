"""What the user names: models, texts and labelled examples."""

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
