"""How many operations the low-rank methods take, from shapes: declared beside what does them, compared in a test.

Each function is given the shapes ``(out, in)`` of the weights that read one tensor, whose Gram is factored once for all
of them, and the method's options.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from pared.operations import Operation, product

if TYPE_CHECKING:
    from pared.lowrank.registry import LossOptimal

Shapes = Sequence[tuple[int, int]]


def scaled(shapes: Shapes, _: object) -> list[Operation]:
    """Of the weight alone, or with one number for every input."""
    return [one for out, width in shapes for one in (_by_outputs(out, width) if out <= width else _by_root(out, width))]


def whitened(shapes: Shapes, _: object) -> list[Operation]:
    """Of the weight and the Gram of its inputs, or of its outputs where that is fewer products a token."""
    width = shapes[0][1]
    if width**2 > sum(out**2 for out, _ in shapes):
        return [one for out, _ in shapes for one in (Operation("cholesky", (out,)), Operation("eigh", (out,)))]
    return [Operation("cholesky", (width,)), *(one for out, _ in shapes for one in _whitened(out, width))]


def both_sides(shapes: Shapes, options: "LossOptimal") -> list[Operation]:
    """Of the weight, the Gram of its inputs and what is known of the gradients of its outputs."""
    found, width = list[Operation](), shapes[0][1]
    if any(out > width for out, _ in shapes):
        found.append(Operation("cholesky", (width,)))
    for out, _ in shapes:
        if options.output_weighting == "full":
            found += [Operation("cholesky", (out,)), product(out, out, width)]
        found += _whitened(out, width)
    return found


def factors(shape: tuple[int, int], rank: int, options: object) -> list[Operation]:
    """Of cutting the factors of one rank from a decomposition."""
    out, width = shape
    # Where directions are told by inputs the weighted weight is kept, and nothing is weighted again.
    full = getattr(options, "output_weighting", "") == "full" and out <= width
    found = [product(out, out, width)] if full else []
    if out > width:
        found.append(product(out, width, rank))
    found.append(product(rank, out if out <= width else width, width))
    return [*found, Operation("triangular", (out, rank))] if full else found


def _whitened(out: int, width: int) -> list[Operation]:
    if out <= width:
        return [product(out, width, width), product(out, width, out), Operation("eigh", (out,))]
    square = product(width, width, width)
    return [product(width, out, width), square, square, Operation("plain eigh", (width,)), square]


def _by_outputs(out: int, width: int) -> list[Operation]:
    return [product(out, width, out), Operation("eigh", (out,))]


def _by_root(out: int, width: int) -> list[Operation]:
    return [product(width, out, width), Operation("plain eigh", (width,))]
