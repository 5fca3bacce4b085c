"""The mathematics of widths: which channels of an MLP stay, and the weight that makes up for those that go."""

from typing import TYPE_CHECKING

from pared.lazy import lazy_package

if TYPE_CHECKING:
    from pared.widths.removal import Channels, remove_channels

__all__ = ["Channels", "remove_channels"]

lazy_package(__name__, {"pared.widths.removal": ["Channels", "remove_channels"]})
