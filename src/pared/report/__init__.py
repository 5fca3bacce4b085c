"""What a person looks at, made from results as data."""

from typing import TYPE_CHECKING

from pared.lazy import lazy_package

if TYPE_CHECKING:
    from pared.report.card import model_card
    from pared.report.table import comparison

__all__ = ["comparison", "model_card"]

lazy_package(
    __name__,
    {
        "pared.report.card": ["model_card"],
        "pared.report.table": ["comparison"],
    },
)
