"""Drives the road: from a model and a recipe to a compressed model and a folder."""

from typing import TYPE_CHECKING

from pared.lazy import lazy_package

if TYPE_CHECKING:
    from pared.engine.asked import EVERY_METHOD, allocation_of, decided_from_data, method_of, plan_of
    from pared.engine.compressed import Compressed
    from pared.engine.compression import compress
    from pared.engine.job import Outcome, reusable, run
    from pared.engine.passes import collect
    from pared.engine.progress import Progress, Silent
    from pared.engine.pruning import look, prune

__all__ = [
    "EVERY_METHOD",
    "Compressed",
    "Outcome",
    "Progress",
    "Silent",
    "allocation_of",
    "collect",
    "compress",
    "decided_from_data",
    "look",
    "method_of",
    "plan_of",
    "prune",
    "reusable",
    "run",
]

lazy_package(
    __name__,
    {
        "pared.engine.asked": ["EVERY_METHOD", "allocation_of", "decided_from_data", "method_of", "plan_of"],
        "pared.engine.compressed": ["Compressed"],
        "pared.engine.compression": ["compress"],
        "pared.engine.job": ["Outcome", "reusable", "run"],
        "pared.engine.passes": ["collect"],
        "pared.engine.progress": ["Progress", "Silent"],
        "pared.engine.pruning": ["look", "prune"],
    },
)
