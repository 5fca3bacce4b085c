"""What a method of widths is given: the layers that read and make the channels of one group."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from pared.lowrank.registry import Statistics


@dataclass(frozen=True)
class Maker:
    """A layer whose outputs make channels.

    Attributes:
        W_ON: its weight ``(out, in)``.
        statistics: of its site, by name.
        rows_GR: which of its outputs make each channel, int64 ``(channels, outputs of one)``.
    """

    W_ON: torch.Tensor
    statistics: Statistics
    rows_GR: torch.Tensor


@dataclass(frozen=True)
class GroupLayers:
    """The layers of one channel group: an MLP's, or an attention's whose channels are its key/value heads.

    Attributes:
        W_ON: the weight that reads the channels ``(out, channels · inputs)``.
        statistics: of its site, by name.
        inputs: of that weight that one channel has, side by side.
        least: the smallest width that is of interest.
        makers: gives the layers that make the channels; their statistics are read when it is called.
    """

    W_ON: torch.Tensor
    statistics: Statistics
    inputs: int = 1
    least: int = 0
    makers: Callable[[], Sequence[Maker]] = tuple
