"""The mathematics of widths: which channels of an MLP stay, and the weight that makes up for those that go."""

from typing import TYPE_CHECKING

from pared.lazy import lazy_package

if TYPE_CHECKING:
    from pared.widths.layers import GroupLayers, Maker
    from pared.widths.removal import Channels, in_order_of, remove_channels

__all__ = ["Channels", "GroupLayers", "Maker", "in_order_of", "remove_channels"]

lazy_package(
    __name__,
    {
        "pared.widths.layers": ["GroupLayers", "Maker"],
        "pared.widths.removal": ["Channels", "in_order_of", "remove_channels"],
    },
)
