"""How many operations taking channels out takes, from shapes: declared beside what does it, compared in a test."""

from pared.operations import Operation, product

Shape = tuple[int, int]  # (out, channels) of the weight that reads the channels


def ordered(shape: Shape, options: object, least: int = 0) -> list[Operation]:
    """Of reading the statistics of a weight and putting its channels in order, down to a width that is known."""
    out, width = shape
    squares = Operation("stream", (8 * width**2,), "float64")  # read per token, and damped
    found = [Operation("mirror", (width,)), squares, Operation("cholesky", (width,))]
    if getattr(options, "output_weighting", "") == "full":
        found += [Operation("mirror", (out,)), Operation("stream", (3 * out**2,), "float64")]
        found += [Operation("cholesky", (out,)), product(out, out, width)]
    return [*found, Operation("channels", (out, width, least))]


def weight_that_reads(shape: Shape, width: int) -> list[Operation]:
    """Of the least-squares weight that reads the channels that stay."""
    out, channels = shape
    if width == channels:
        return []
    return [product(out, channels - width, width), Operation("triangular", (width, out))]
