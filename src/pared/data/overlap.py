"""How much of what is measured on was learned from: the same characters of one text, or the same words in two."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from pared.data.windows import Windows, merged

RUN = 32  # tokens that two texts have in common by no chance
ROWS = 512  # compared at a time
MULTIPLIER = np.uint64(6364136223846793005)

Hashes = npt.NDArray[np.uint64]


def overlap(measured: Windows, learned: Sequence[Mapping[str, Any]], tokens: Iterable[torch.Tensor] = ()) -> float:
    """Return the share of what is measured on that was learned from.

    Two descriptions of one text, whatever it is called, are compared by the characters that were read. Two texts are
    compared by runs of tokens that are in both; a run that is repeated within what is measured on counts as a
    phrase of that text.

    Args:
        measured: windows to measure on.
        learned: descriptions (``Windows.describe``) of what was calibrated or trained on.
        tokens: of the same, each ``(windows, length)`` or ``(length,)``, where they are still there.
    """
    same = _share_of_characters(measured, learned)
    return max(same, _share_of_runs(measured.tokens, [*tokens]))


def _share_of_characters(measured: Windows, learned: Sequence[Mapping[str, Any]]) -> float:
    if not measured.spans or not measured.whole:
        return 0.0
    read = [tuple(span) for one in learned if one.get("whole") == measured.whole for span in one.get("characters", ())]
    total = sum(stop - start for start, stop in measured.spans)
    seen = sum(max(0, min(stop, end) - max(start, begin))
               for start, stop in measured.spans for begin, end in merged(read))  # fmt: skip
    return seen / total if total else 0.0


def _share_of_runs(measured: torch.Tensor, learned: Sequence[torch.Tensor]) -> float:
    run = min(RUN, measured.shape[1])
    by_length: dict[int, list[torch.Tensor]] = {}
    for tokens in learned:
        by_length.setdefault(tokens.shape[-1], []).append(tokens if tokens.ndim == 2 else tokens[None])
    found, where, count = np.unique(_hashes(measured, run), return_inverse=True, return_counts=True)
    known = np.zeros(len(found), dtype=bool)
    for length, rows in by_length.items():
        tokens_WL = torch.cat(rows)
        for start in range(0, len(tokens_WL), ROWS) if length >= run else ():
            place, here = _places(found, _hashes(tokens_WL[start : start + ROWS], run).ravel())
            known[place[here]] = True
    hits = (known & (count == 1))[where].reshape(len(measured), -1)
    seen = np.zeros(tuple(measured.shape), dtype=bool)
    for offset in range(run):
        seen[:, offset : offset + hits.shape[1]] |= hits
    return float(seen.mean())


def _places(found: Hashes, hashes: Hashes) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.bool_]]:
    """Return where numbers stand among sorted ones, and whether they do."""
    place = np.minimum(np.searchsorted(found, hashes), len(found) - 1)
    return place, found[place] == hashes


def _hashes(tokens_WL: torch.Tensor, run: int) -> Hashes:
    """Return a number for every run of so many tokens of a window, ``(windows, length - run + 1)``."""
    ids = tokens_WL.cpu().numpy().astype(np.uint64)
    count = ids.shape[1] - run + 1
    found = np.zeros((len(ids), count), dtype=np.uint64)
    for offset in range(run):
        found = found * MULTIPLIER + ids[:, offset : offset + count] + np.uint64(1)
    return found
