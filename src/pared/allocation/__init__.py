"""How much each weight may keep: from units and a budget to decisions; one file per allocator."""

from typing import TYPE_CHECKING

from pared.lazy import lazy_package

if TYPE_CHECKING:
    from pared.allocation.registry import (
        ALLOCATORS,
        LAYER_ALLOCATORS,
        Allocator,
        LayerAllocator,
        allocator_of,
        layer_allocator_of,
    )
    from pared.allocation.units import Budget, Evidence, Unit

__all__ = [
    "ALLOCATORS",
    "LAYER_ALLOCATORS",
    "Allocator",
    "Budget",
    "Evidence",
    "LayerAllocator",
    "Unit",
    "allocator_of",
    "layer_allocator_of",
]

lazy_package(
    __name__,
    {
        "pared.allocation.registry": [
            "ALLOCATORS",
            "LAYER_ALLOCATORS",
            "Allocator",
            "LayerAllocator",
            "allocator_of",
            "layer_allocator_of",
        ],
        "pared.allocation.units": ["Budget", "Evidence", "Unit"],
    },
)
