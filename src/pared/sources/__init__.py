"""What the user names: models and texts."""

from pared.sources.models import ModelSource, find_model
from pared.sources.texts import Text, find_text
from pared.sources.windows import Windows, cut

__all__ = ["ModelSource", "Text", "Windows", "cut", "find_model", "find_text"]
