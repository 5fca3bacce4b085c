"""Compresses a model block by block: a recipe resolved once, then observe, solve, allocate, install."""

from typing import TYPE_CHECKING

from pared.lazy import lazy_package

if TYPE_CHECKING:
    from pared.engine.allocate import plan_from_shapes
    from pared.engine.compress import collect_evidence, compress_blocks
    from pared.engine.observe import Observer
    from pared.engine.result import CompressedBlocks
    from pared.engine.spec import CompressionSpec, ExpertSpec, LowRankSpec, PassSpec, SparseSpec, resolve
    from pared.engine.statistics.collect import collect
    from pared.progress import Progress, Silent

__all__ = [
    "CompressedBlocks",
    "CompressionSpec",
    "ExpertSpec",
    "LowRankSpec",
    "Observer",
    "PassSpec",
    "Progress",
    "Silent",
    "SparseSpec",
    "collect",
    "collect_evidence",
    "compress_blocks",
    "plan_from_shapes",
    "resolve",
]

lazy_package(
    __name__,
    {
        "pared.engine.allocate": ["plan_from_shapes"],
        "pared.engine.spec": [
            "CompressionSpec",
            "ExpertSpec",
            "LowRankSpec",
            "PassSpec",
            "SparseSpec",
            "resolve",
        ],
        "pared.engine.result": ["CompressedBlocks"],
        "pared.engine.compress": ["collect_evidence", "compress_blocks"],
        "pared.engine.statistics.collect": ["collect"],
        "pared.engine.observe": ["Observer"],
        "pared.progress": ["Progress", "Silent"],
    },
)
