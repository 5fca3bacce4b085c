"""Drives the road: from a model and a recipe to a compressed model and a folder."""

from pared.engine.asked import allocation_of, method_of, plan_of
from pared.engine.compression import Compressed, compress
from pared.engine.job import Outcome, reusable, run
from pared.engine.passes import collect
from pared.engine.progress import Progress, Silent

__all__ = [
    "Compressed",
    "Outcome",
    "Progress",
    "Silent",
    "allocation_of",
    "collect",
    "compress",
    "method_of",
    "plan_of",
    "reusable",
    "run",
]
