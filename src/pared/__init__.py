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
    from pared.checkpoint import load_tokenizer, verify
    from pared.entrypoints.api import collect_statistics, evaluate, plan, search
    from pared.entrypoints.compare import compare
    from pared.entrypoints.compress import compress
    from pared.entrypoints.compression.result import Compressed
    from pared.entrypoints.convert import convert
    from pared.entrypoints.evaluate import perplexity
    from pared.entrypoints.explore import Explored, explore
    from pared.entrypoints.export import export
    from pared.entrypoints.report import report
    from pared.entrypoints.run import run
    from pared.entrypoints.slice import load, slice
    from pared.entrypoints.train import tune
    from pared.environment import __version__
    from pared.errors import ParedError
    from pared.schema.evaluate import EvaluationConfig
    from pared.schema.explore import ExploreConfig
    from pared.schema.manifest import Manifest
    from pared.schema.plan import Plan
    from pared.schema.recipe import Calibration, Evaluation, Recipe
    from pared.schema.search import SearchConfig
    from pared.schema.training import TrainingConfig

__all__ = [
    "Calibration",
    "Compressed",
    "Evaluation",
    "EvaluationConfig",
    "ExploreConfig",
    "Explored",
    "Manifest",
    "ParedError",
    "Plan",
    "Recipe",
    "SearchConfig",
    "TrainingConfig",
    "__version__",
    "collect_statistics",
    "compare",
    "compress",
    "convert",
    "evaluate",
    "explore",
    "export",
    "load",
    "load_tokenizer",
    "perplexity",
    "plan",
    "report",
    "run",
    "search",
    "slice",
    "tune",
    "verify",
]

lazy_package(
    __name__,
    {
        "pared.checkpoint": ["load_tokenizer", "verify"],
        "pared.entrypoints.api": ["collect_statistics", "evaluate", "plan", "search"],
        "pared.entrypoints.compare": ["compare"],
        "pared.entrypoints.compress": ["compress"],
        "pared.entrypoints.convert": ["convert"],
        "pared.entrypoints.evaluate": ["perplexity"],
        "pared.entrypoints.explore": ["Explored", "explore"],
        "pared.entrypoints.export": ["export"],
        "pared.entrypoints.report": ["report"],
        "pared.entrypoints.compression.result": ["Compressed"],
        "pared.entrypoints.run": ["run"],
        "pared.entrypoints.slice": ["load", "slice"],
        "pared.entrypoints.train": ["tune"],
        "pared.environment": ["__version__"],
        "pared.errors": ["ParedError"],
        "pared.schema.evaluate": ["EvaluationConfig"],
        "pared.schema.explore": ["ExploreConfig"],
        "pared.schema.manifest": ["Manifest"],
        "pared.schema.plan": ["Plan"],
        "pared.schema.recipe": ["Calibration", "Evaluation", "Recipe"],
        "pared.schema.search": ["SearchConfig"],
        "pared.schema.training": ["TrainingConfig"],
    },
)


def _register(_: ModuleType) -> None:
    """Teach transformers the format."""
    importlib.import_module("pared.checkpoint.loader")


when_imported("transformers.quantizers", _register)
