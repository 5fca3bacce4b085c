"""Drives the road: from a model and a recipe to a compressed model."""

from typing import TYPE_CHECKING

from pared.lazy import lazy_package

if TYPE_CHECKING:
    from pared.engine.allocate import decided_from_data, plan_of
    from pared.engine.compress import compress
    from pared.engine.observe import collect
    from pared.engine.pruning import look, prune
    from pared.engine.result import Compressed
    from pared.engine.spec import EVERY_METHOD, allocation_of, method_of

__all__ = [
    "EVERY_METHOD",
    "Compressed",
    "allocation_of",
    "collect",
    "compress",
    "decided_from_data",
    "look",
    "method_of",
    "plan_of",
    "prune",
]

lazy_package(
    __name__,
    {
        "pared.engine.allocate": ["decided_from_data", "plan_of"],
        "pared.engine.compress": ["compress"],
        "pared.engine.observe": ["collect"],
        "pared.engine.pruning": ["look", "prune"],
        "pared.engine.result": ["Compressed"],
        "pared.engine.spec": ["EVERY_METHOD", "allocation_of", "method_of"],
    },
)
