"""In how few bits weights may be stored, and what that takes."""

from collections.abc import Iterable
from typing import Literal, NamedTuple, get_args

from pared.schema.base import Strict

Form = Literal["int8", "int4"]
FORMS: tuple[Form, ...] = get_args(Form)


class Layout(NamedTuple):
    """How weights of a form are stored.

    Attributes:
        bits: of a weight.
        group: consecutive inputs of an output that have one scale; 0 for all of them.
    """

    bits: int
    group: int


LAYOUTS: dict[str, Layout] = {"int8": Layout(8, 0), "int4": Layout(4, 64)}


def stored_bytes(form: str | None, out_features: int, in_features: int, itemsize: int) -> int:
    """Return the bytes of a matrix, with its scales.

    Args:
        form: of its weights; None for ``itemsize`` bytes each.
        out_features: its rows, which fill whole bytes.
        in_features: its columns.
        itemsize: bytes of a weight, or a scale, that is stored as it is.
    """
    if form is None:
        return out_features * in_features * itemsize
    bits, group = LAYOUTS[form]
    groups = -(-in_features // group) if group else 1
    return out_features * (-(-in_features * bits // 8) + groups * itemsize)


class InFewBits(Strict):
    """A decision whose matrices may be stored in few bits.

    Attributes:
        quantized: the form of their weights; None as the model has them.
    """

    quantized: Form | None = None

    def matrices(self, out_features: int, in_features: int) -> Iterable[tuple[int, int]]:
        """Return the shapes ``(out, in)`` of what is stored of a site of this shape."""
        raise NotImplementedError

    def stored_bytes(self, out_features: int, in_features: int, itemsize: int) -> int:
        """Return the bytes of a site of this shape."""
        shapes = self.matrices(out_features, in_features)
        return sum(stored_bytes(self.quantized, m, n, itemsize) for m, n in shapes)

    @property
    def form(self) -> str:
        """The form as a part of a sentence."""
        return f", {self.quantized}" if self.quantized else ""
