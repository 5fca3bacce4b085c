"""Layers that can lose inputs and outputs together: what one reads is what others make."""

from dataclasses import dataclass
from typing import Literal

import torch

from pared.structure.model import Site


@dataclass(frozen=True)
class Producer:
    """A layer whose outputs make channels.

    Attributes:
        site: the layer.
        rows: of its outputs that make one channel: 2 of a fused gate and up, all of a head's of a query layer.
        parts: of how many equal parts its outputs consist, one after the other, each with as many for every channel: 2
            of a fused gate and up, 3 of a fused query, key and value; 1 where those of a channel lie side by side.
    """

    site: Site
    rows: int = 1
    parts: int = 1

    def outputs(self, channels_K: torch.Tensor) -> torch.Tensor:
        """Return which outputs make these channels, in an order in which they can be kept, int64."""
        part, together = self.site.out_features // self.parts, self.rows // self.parts
        device = channels_K.device
        starts = torch.arange(self.parts, device=device)[:, None, None] * part + channels_K[:, None] * together
        return (starts + torch.arange(together, device=device)).flatten()


@dataclass(frozen=True)
class Count:
    """A number that a module reads its heads by, a plain attribute of it.

    Attributes:
        module: full name of the module.
        attribute: its name.
        each: what a channel adds to it.
    """

    module: str
    attribute: str
    each: int


@dataclass(frozen=True)
class ChannelGroup:
    """Layers of one block that can lose channels together: those of an MLP, or the heads of an attention.

    Attributes:
        consumer: the layer whose inputs the channels are.
        producers: the layers whose outputs make them.
        inputs: of the consumer that one channel has, side by side: 1 of an MLP; of a key/value head those that its
            query heads make.
        unit: what a channel is.
        counts: attributes of modules that go with how many there are.
    """

    consumer: Site
    producers: tuple[Producer, ...]
    inputs: int = 1
    unit: Literal["channel", "head"] = "channel"
    counts: tuple[Count, ...] = ()

    @property
    def name(self) -> str:
        """That of the consumer."""
        return self.consumer.name

    @property
    def channels(self) -> int:
        """How many there are."""
        return self.consumer.in_features // self.inputs

    @property
    def sites(self) -> tuple[Site, ...]:
        """The consumer and the producers."""
        return self.consumer, *(one.site for one in self.producers)

    @property
    def parameters_each(self) -> int:
        """Weights that a channel has."""
        made = sum(one.rows * one.site.in_features for one in self.producers)
        return self.inputs * self.consumer.out_features + made

    def read(self, channels_K: torch.Tensor) -> torch.Tensor:
        """Return which inputs of the consumer are those of some channels, int64."""
        return (channels_K[:, None] * self.inputs + torch.arange(self.inputs, device=channels_K.device)).flatten()


@dataclass(frozen=True)
class Found:
    """What was found of the channels of a model.

    Attributes:
        groups: in the model's order.
        reasons: for every other site that was looked at, why it is no consumer.
    """

    groups: tuple[ChannelGroup, ...]
    reasons: dict[str, str]


class RefusedError(Exception):
    """A site that is no consumer of channels; says why."""
