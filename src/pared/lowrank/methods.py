"""The low-rank methods, one declaration each: which statistics it needs and how one weight is decomposed."""

from collections.abc import Callable, Mapping, Sequence
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
        needs: names of the statistics it reads, from the shapes ``(out, in)`` of the sites that read one tensor.
        decompose: from a weight ``(out, in)`` and those statistics by name to a decomposition.
    """

    name: str
    paper: str
    summary: str
    needs: Callable[[Sequence[tuple[int, int]]], frozenset[str]]
    decompose: Callable[[torch.Tensor, Mapping[str, torch.Tensor]], Decomposition]

    @property
    def calibrated(self) -> bool:
        """Whether it needs data at all."""
        return bool(self.needs([(1, 1)]))


def nothing(_: Sequence[tuple[int, int]]) -> frozenset[str]:
    """Need no data."""
    return frozenset()


def either_gram(shapes: Sequence[tuple[int, int]]) -> frozenset[str]:
    """Need the Gram of the one input or those of the outputs, whichever is fewer products a token."""
    of_input = shapes[0][1] ** 2
    of_outputs = sum(out_features**2 for out_features, _ in shapes)
    return frozenset({"gram" if of_input <= of_outputs else "output_gram"})


def _whitened(W_ON: torch.Tensor, statistics: Mapping[str, torch.Tensor]) -> Decomposition:
    if "gram" in statistics:
        return whitening.decompose(W_ON, statistics["gram"])
    return whitening.decompose_by_outputs(W_ON, statistics["output_gram"])


METHODS = {
    method.name: method
    for method in (
        LowRankMethod(
            name="svd",
            paper="Eckart and Young, 1936",
            summary="least error of the weight itself; needs no data",
            needs=nothing,
            decompose=lambda W_ON, _: svd.decompose(W_ON),
        ),
        LowRankMethod(
            name="svd-llm",
            paper="Wang et al., ICLR 2025 (arXiv 2403.07378), whitening",
            summary="least error of the layer's output on the calibration data",
            needs=either_gram,
            decompose=_whitened,
        ),
    )
}
