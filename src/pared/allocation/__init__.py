"""How much each weight may keep: from units and a budget to decisions; one file per allocator."""

from typing import TYPE_CHECKING

from pared.lazy import lazy_package

if TYPE_CHECKING:
    from pared.allocation.options import ProgramOptions, UnitOptions
    from pared.allocation.registry import ALLOCATORS, Allocator, allocator_of, allocators_for
    from pared.allocation.units import Budget, Evidence, Unit

__all__ = [
    "ALLOCATORS",
    "Allocator",
    "Budget",
    "Evidence",
    "ProgramOptions",
    "Unit",
    "UnitOptions",
    "allocator_of",
    "allocators_for",
]

lazy_package(
    __name__,
    {
        "pared.allocation.options": ["ProgramOptions", "UnitOptions"],
        "pared.allocation.registry": ["ALLOCATORS", "Allocator", "allocator_of", "allocators_for"],
        "pared.allocation.units": ["Budget", "Evidence", "Unit"],
    },
)
