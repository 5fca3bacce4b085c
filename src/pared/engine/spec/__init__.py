"""A recipe resolved once: every ``auto`` resolved, every name looked up, and the passes over the blocks as data.

All work on a compression is given the :class:`LowRankSpec`, :class:`SparseSpec` or :class:`ExpertSpec`; the recipe is
not consulted again.
The type of the spec selects what does the work.
"""

from pared.engine.spec.passes import HandOn, PassSpec, Runs
from pared.engine.spec.resolve import method_of, resolve, resolve_low_rank, resolve_sparse
from pared.engine.spec.specs import CompressionSpec, ExpertSpec, LowRankSpec, SparseSpec

__all__ = [
    "CompressionSpec",
    "ExpertSpec",
    "HandOn",
    "LowRankSpec",
    "PassSpec",
    "Runs",
    "SparseSpec",
    "method_of",
    "resolve",
    "resolve_low_rank",
    "resolve_sparse",
]
