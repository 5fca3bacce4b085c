"""How many operations the pruning methods take, from shapes: declared beside what does them, compared in a test."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from pared.operations import Operation

if TYPE_CHECKING:
    from pared.sparsity.registry import SparseGpt

Shapes = Sequence[tuple[int, int]]


def by_matrix(shapes: Shapes, _: object) -> list[Operation]:
    """Of scores that are compared over a whole weight ``(out, in)``."""
    return [Operation("select", (1, out * width)) for out, width in shapes]


def by_row(shapes: Shapes, _: object) -> list[Operation]:
    """Of scores that are compared within every output."""
    return [Operation("select", (out, width)) for out, width in shapes]


def by_sparsegpt(shapes: Shapes, options: "SparseGpt") -> list[Operation]:
    """Of the factor of the inputs' inverse Hessian, once for all that read one tensor, and a sweep over each weight."""
    width, found = shapes[0][1], list[Operation]()
    found += [Operation("cholesky", (width,)), Operation("triangular", (width, width))]
    found.append(Operation("stream", (12 * width**2,)))  # the Gram is scaled, damped, turned round and looked through
    for out, _ in shapes:
        block = min(options.block, width)
        found.append(Operation("stream", (2 * width**2,)))
        found.append(Operation("sweep", (out, width, block)))
        found.append(Operation("select", (1, out * block), times=math.ceil(width / block)))
    return found
