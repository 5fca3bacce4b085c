"""Where a text is cut in two: at the coarsest boundary that lies near the share asked for."""

from collections.abc import Iterator, Sequence
from itertools import accumulate

BLANK_LINES = "\n\n"
NEAR = 0.05  # of the text: a cut this far from the share asked for is as good as one right there
NEAR_BETWEEN_DOCUMENTS = 0.1  # a document of which half is learned from and half measured on is the worse evil


def cut_in_two(documents: Sequence[str], share: float) -> tuple[tuple[str, ...], tuple[str, ...], int] | None:
    """Cut documents in two at the end of one, else at a blank line, at the end of a line, or at a blank.

    Of each kind of boundary the one nearest to the share counts. The coarsest kind that has one within ``NEAR`` of it
    (of documents ``NEAR_BETWEEN_DOCUMENTS``) is taken; where none has, the nearest of all.

    Args:
        documents: in order; joined by blank lines they are the whole text.
        share: of the characters that the first part has, as nearly as can be.

    Returns:
        Both parts, neither of them blank, and the character of the whole that the second begins at; None if there is
        no such cut.
    """
    best: tuple[float, int, int] | None = None
    whole = BLANK_LINES.join(documents)
    for near, off, first_end, second_start in _candidates(documents, whole, share):
        if best is None or off < best[0]:
            best = off, first_end, second_start
        if off <= near:
            break
    if best is None:
        return None
    _, first_end, second_start = best
    first, second, start = [], [], len(whole)
    at = 0
    for document in documents:
        end = at + len(document)
        if at <= first_end:
            first.append(whole[at : min(end, first_end)])
        if end >= second_start:
            start = min(start, max(at, second_start))
            second.append(whole[max(at, second_start) : end])
        at = end + len(BLANK_LINES)
    return tuple(first), tuple(second), start


def _candidates(documents: Sequence[str], whole: str, share: float) -> Iterator[tuple[float, float, int, int]]:
    """Yield of every kind of boundary the nearest: how far off it may be and is, and where the parts end and begin."""
    low, high = len(whole) - len(whole.lstrip()), len(whole.rstrip())  # what is cut off must not be blank
    lengths = [*accumulate(map(len, documents))]
    ends = [length + index * len(BLANK_LINES) for index, length in enumerate(lengths)]
    if found := [
        (abs(length / lengths[-1] - share), end, end + len(BLANK_LINES))
        for length, end in zip(lengths, ends, strict=True)
        if low < end and end + len(BLANK_LINES) < high
    ]:
        yield NEAR_BETWEEN_DOCUMENTS, *min(found)
    target = low + round(share * (high - low))
    for mark in (BLANK_LINES, "\n", " "):
        places = (whole.rfind(mark, low, max(low, target)), whole.find(mark, max(low, target - len(mark)), high))
        if found := [(abs(at - target) / (high - low), at, at + len(mark)) for at in places if at >= 0]:
            yield NEAR, *min(found)
