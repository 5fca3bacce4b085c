"""The mathematics of widths: which channels or experts stay, and the weight that makes up for channels that go."""

from typing import TYPE_CHECKING

from pared.lazy import lazy_package

if TYPE_CHECKING:
    from pared.widths.experts import Experts, MixtureMoments
    from pared.widths.layers import GroupLayers, Maker
    from pared.widths.removal import Channels, in_order_of, remove_channels

__all__ = ["Channels", "Experts", "GroupLayers", "Maker", "MixtureMoments", "in_order_of", "remove_channels"]

lazy_package(
    __name__,
    {
        "pared.widths.experts": ["Experts", "MixtureMoments"],
        "pared.widths.layers": ["GroupLayers", "Maker"],
        "pared.widths.removal": ["Channels", "in_order_of", "remove_channels"],
    },
)
