"""Models by name: folders, the Hub, GGUF files and the embedded one."""

from typing import TYPE_CHECKING

from pared.lazy import lazy_package

if TYPE_CHECKING:
    from pared.models.source import ModelSource, find_model

__all__ = ["ModelSource", "find_model"]

lazy_package(
    __name__,
    {
        "pared.models.source": ["ModelSource", "find_model"],
    },
)
