"""Make language models smaller and hand them back as ordinary Hugging Face checkpoints.

Importing this package teaches transformers to load the folders it makes.
"""

from importlib.metadata import version

from pared.api import perplexity
from pared.checkpoint import load, load_tokenizer, verify
from pared.engine import Compressed, compress, run
from pared.errors import ParedError
from pared.plan import Plan
from pared.recipe import Calibration, Evaluation, Recipe

__version__ = version("pared")
__all__ = [
    "Calibration",
    "Compressed",
    "Evaluation",
    "ParedError",
    "Plan",
    "Recipe",
    "compress",
    "load",
    "load_tokenizer",
    "perplexity",
    "run",
    "verify",
]
