"""The low-rank methods, one declaration each: which statistics it needs and how one weight is decomposed."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from pared.lowrank import svd, whitening
from pared.lowrank.decomposition import Decomposition


@dataclass(frozen=True)
class LowRankMethod:
    """A low-rank method.

    Attributes:
        name: what a recipe calls it.
        paper: where it comes from.
        summary: what it minimises, in a line.
        needs: names of the statistics it reads.
        decompose: from a weight ``(out, in)`` and those statistics by name to a decomposition.
    """

    name: str
    paper: str
    summary: str
    needs: frozenset[str]
    decompose: Callable[[torch.Tensor, Mapping[str, torch.Tensor]], Decomposition]


METHODS = {
    method.name: method
    for method in (
        LowRankMethod(
            name="svd",
            paper="Eckart and Young, 1936",
            summary="least error of the weight itself; needs no data",
            needs=frozenset(),
            decompose=lambda W_ON, _: svd.decompose(W_ON),
        ),
        LowRankMethod(
            name="svd-llm",
            paper="Wang et al., ICLR 2025 (arXiv 2403.07378), whitening",
            summary="least error of the layer's output on the calibration data",
            needs=frozenset({"gram"}),
            decompose=lambda W_ON, statistics: whitening.decompose(W_ON, statistics["gram"]),
        ),
    )
}
