"""How much of what is measured on was learned from: the same characters of one text, or the same words in two."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from pared.sources.windows import Windows, merged

RUN = 32  # tokens that two texts have in common by no chance
MULTIPLIER = np.uint64(6364136223846793005)

Hashes = npt.NDArray[np.uint64]


def overlap(measured: Windows, learned: Sequence[Mapping[str, Any]], tokens: Iterable[torch.Tensor] = ()) -> float:
    """Return the share of what is measured on that was learned from.

    Two descriptions of one text, whatever it is called, are compared by the characters that were read. Two texts are
    compared by runs of tokens that stand in both; a run that is repeated within what is measured on counts as a
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
    known = [_hashes(row, run) for tokens in learned for row in (tokens if tokens.ndim == 2 else tokens[None])]
    if not known:
        return 0.0
    here = np.stack([_hashes(row, run) for row in measured])
    _, first, count = np.unique(here, return_index=True, return_counts=True)
    once = np.zeros(here.size, dtype=bool)
    once[first[count == 1]] = True
    hits = np.isin(here, np.concatenate(known)) & once.reshape(here.shape)
    seen = np.zeros(tuple(measured.shape), dtype=bool)
    for offset in range(run):
        seen[:, offset : offset + hits.shape[1]] |= hits
    return float(seen.mean())


def _hashes(row: torch.Tensor, run: int) -> Hashes:
    """Return a number for every run of so many tokens of a row; none of a shorter row."""
    ids = row.cpu().numpy().astype(np.uint64)
    count = len(ids) - run + 1
    if count < 1:
        return np.zeros(0, dtype=np.uint64)
    found = np.zeros(count, dtype=np.uint64)
    for offset in range(run):
        found = found * MULTIPLIER + ids[offset : offset + count] + np.uint64(1)
    return found
