"""The decision that a layer has fewer inputs or outputs than it had, and channels as text."""

import re
from collections.abc import Iterable
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from pared.schema.bits import InFewBits

INDEX_BYTES = 4  # of an int32
RANGES = re.compile(r"(\d+(-\d+)?(,\d+(-\d+)?)*)?")


def ranges_of(channels: Iterable[int]) -> str:
    """Return rising numbers as text: ``0-3,7``."""
    runs: list[list[int]] = []
    for channel in channels:
        if runs and channel == runs[-1][1] + 1:
            runs[-1][1] = channel
        else:
            runs.append([channel, channel])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def channels_of(text: str) -> list[int]:
    """Return the numbers that :func:`ranges_of` wrote."""
    found: list[int] = []
    for part in filter(None, text.split(",")):
        first, _, last = part.partition("-")
        found += range(int(first), int(last or first) + 1)
    return found


def _are_ranges(text: str | None) -> str | None:
    if text is not None and not RANGES.fullmatch(text):
        raise ValueError(f"expected rising ranges such as 0-3,7, got {text[:40]!r}")
    return text


class Width(InFewBits):
    """Some channels stay: a layer that reads them has fewer inputs, those that make them fewer outputs.

    Attributes:
        group: name of the site that reads the channels.
        side: whether these are this site's inputs (``in``) or its outputs (``out``).
        width: channels that stay.
        channels: of the dense model.
        rows: outputs of this site that make one channel, or inputs that it has: 2 outputs of a fused gate and up.
        has_bias: whether this site's bias has a value for each of its outputs, which go too.
        kept: which channels stay, with the site that reads them: ``0-3,7``; none before they are chosen.
        unit: what a channel is: one of an MLP, a key/value head with its query heads, or an expert of a mixture, whose
            tensors are seen as one tall weight.
        adds_bias: whether the site that reads the channels gets a bias, which it did not have.
        rank: of the weight that is left; none if it is stored as it is.
        pivoted: a weight of a rank is stored by its pivots, ``rank²`` parameters fewer.
    """

    kind: Literal["width"] = "width"
    group: str
    side: Literal["in", "out"]
    width: Annotated[int, Field(ge=1)]
    channels: Annotated[int, Field(ge=1)]
    rows: Annotated[int, Field(ge=1)] = 1
    has_bias: bool = False
    kept: Annotated[str | None, AfterValidator(_are_ranges)] = None
    unit: Literal["channel", "head", "expert"] = "channel"
    adds_bias: bool = False
    rank: Annotated[int | None, Field(ge=1)] = None
    pivoted: bool = False

    def ranked(self, rank: int, pivoted: bool) -> "Width":
        """Return the decision that what is left has a rank."""
        return self.model_copy(update={"rank": rank, "pivoted": pivoted})

    def shape(self, out_features: int, in_features: int) -> tuple[int, int]:
        """Return the shape that is left of a site of this one, ``(out, in)``."""
        left = self.width * self.rows
        return (out_features, left) if self.side == "in" else (left, in_features)

    def parameters(self, out_features: int, in_features: int) -> int:
        """Stored weight parameters of a site of this shape."""
        m, n = self.shape(out_features, in_features)
        return m * n if self.rank is None else self.rank * (m + n) - (self.rank**2 if self.pivoted else 0)

    def matrices(self, out_features: int, in_features: int) -> list[tuple[int, int]]:
        """What is left of the weight, or both of its factors."""
        m, n = self.shape(out_features, in_features)
        return [(m, n)] if self.rank is None else [(self.rank, n), (m, self.rank)]

    def index_bytes(self, out_features: int, in_features: int) -> int:
        """Bytes stored besides the parameters: the order of the inputs, if pivoted."""
        pivoted = self.rank is not None and self.pivoted
        return INDEX_BYTES * self.shape(out_features, in_features)[1] if pivoted else 0

    @property
    def biases_removed(self) -> int:
        """Numbers that the site's bias loses."""
        return self.rows * (self.channels - self.width) if self.side == "out" and self.has_bias else 0

    def fits(self, out_features: int, in_features: int) -> bool:
        """Whether a site of this shape can have this decision."""
        whole = in_features if self.side == "in" else out_features
        has_rank = self.rank is None or self.rank <= min(self.shape(out_features, in_features))
        return self.width <= self.channels and whole == self.channels * self.rows and has_rank

    def __str__(self) -> str:
        counted = f"{self.width} of {self.channels}"
        text = f"width {counted}" if self.unit == "channel" else f"{counted} {self.unit}s"
        ranked = "" if self.rank is None else f", rank {self.rank}{', pivoted' if self.pivoted else ''}"
        return text + ranked + self.form
