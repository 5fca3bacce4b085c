"""Make language models smaller and hand them back as ordinary Hugging Face checkpoints.

Importing this package teaches transformers to load the folders it makes, whichever of the two is imported first. It
imports neither transformers nor torch by itself: its names are imported when they are first used.
"""

import importlib
from types import ModuleType
from typing import TYPE_CHECKING

from pared.importing import when_imported
from pared.lazy import lazy_package

if TYPE_CHECKING:
    from pared.api import perplexity
    from pared.checkpoint import load, load_tokenizer, verify
    from pared.engine import Compressed, compress, run
    from pared.errors import ParedError
    from pared.plan import Plan
    from pared.recipe import Calibration, Evaluation, Recipe
    from pared.versions import __version__

__all__ = [
    "Calibration",
    "Compressed",
    "Evaluation",
    "ParedError",
    "Plan",
    "Recipe",
    "__version__",
    "compress",
    "load",
    "load_tokenizer",
    "perplexity",
    "run",
    "verify",
]

lazy_package(
    __name__,
    {
        "pared.api": ["perplexity"],
        "pared.checkpoint": ["load", "load_tokenizer", "verify"],
        "pared.engine": ["Compressed", "compress", "run"],
        "pared.errors": ["ParedError"],
        "pared.plan": ["Plan"],
        "pared.recipe": ["Calibration", "Evaluation", "Recipe"],
        "pared.versions": ["__version__"],
    },
)


def _register(_: ModuleType) -> None:
    """Teach transformers the format."""
    importlib.import_module("pared.checkpoint.loader")


when_imported("transformers.quantizers", _register)
