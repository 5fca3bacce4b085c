"""Zeros for candidates: every site's scores are ordered once, and a mask is one comparison with that order."""

import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from pared.allocation.dsa import SCORE_TOKENS, Program, ScoreHistogram, Scores, judge
from pared.engine.install import patched
from pared.errors import ParedError
from pared.search.evolution import Allocation
from pared.sparsity import METHODS, Unstructured, wanda
from pared.structure import Anatomy, Site, weight_of

PRUNERS = ("wanda", "magnitude")


def require_pruner(name: str) -> None:
    """Refuse a pruner whose zeros cannot be had from scores alone.

    Raises:
        ParedError: it is one; says what to do.
    """
    if name in PRUNERS:
        return
    if name in METHODS:
        raise ParedError(
            f"pruner {name} changes the weights it keeps, block after block, so that a candidate costs a whole "
            f"compression; search with wanda and use the program with --method {name} --allocation dsa"
        )
    raise ParedError(f"unknown pruner {name!r}; expected one of {', '.join(PRUNERS)}")


@dataclass(frozen=True)
class Ordered:
    """One site's weights in the order in which they go.

    Attributes:
        site: where.
        dense_ON: the weight as it was.
        order_ON: how many weights go before each, among those it competes with: its row, or the matrix; the smallest
            integer type that holds it.
        rivals: how many compete.
    """

    site: Site
    dense_ON: torch.Tensor
    order_ON: torch.Tensor
    rivals: int

    @classmethod
    def of(cls, site: Site, W_ON: torch.Tensor, energy_N: torch.Tensor, pruner: str) -> "Ordered":
        """Order the weights of a site as its pruner lets them go.

        Args:
            site: where.
            W_ON: the dense weight.
            energy_N: E[x²] of every input; not read by ``magnitude``.
            pruner: one of ``PRUNERS``.
        """
        W_ON = W_ON.detach()
        scores_ON = W_ON.double().abs() if pruner == "magnitude" else wanda.ordering(W_ON, energy_N)
        scores_XG = scores_ON.reshape(1, -1) if pruner == "magnitude" else scores_ON
        rivals = scores_XG.shape[1]
        kind = torch.int16 if rivals < 2**15 else torch.int32
        places_XG = torch.arange(rivals, dtype=kind, device=W_ON.device).expand_as(scores_XG)
        order_XG = torch.empty_like(scores_XG, dtype=kind).scatter_(1, scores_XG.argsort(dim=1, stable=True), places_XG)
        return cls(site, W_ON.clone(), order_XG.view(W_ON.shape), rivals)

    def pruned(self, zeros: int) -> torch.Tensor:
        """Return the weight with so many zeros among those that compete, ``(out, in)``."""
        return self.dense_ON.masked_fill(self.order_ON < zeros, 0)


class ZerosTrial:
    """A model whose candidates are allocations of zeros over blocks. Satisfies :class:`pared.search.objective.Trial`.

    An allocation holds, for every site, the zeros among the weights that compete. Memory beside the model: a copy of
    the covered weights, and two bytes a weight (four where more than 32,767 compete, as for ``magnitude``).

    Attributes:
        model: dense.
        blocks: numbers of the blocks that get a sparsity each.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        anatomy: Anatomy,
        energies: Mapping[str, torch.Tensor],
        pruner: str,
        sparsity: float,
    ) -> None:
        """Score and order all weights.

        Args:
            model: dense.
            anatomy: after the probe pass.
            energies: E[x²] of every input feature, by site; a site that is missing stays dense and is not counted.
            pruner: one of ``PRUNERS``.
            sparsity: of the covered weights.

        Raises:
            ParedError: an energy or a weight is not finite.
        """
        self.model, self.sparsity = model, sparsity
        by_block: dict[int, list[Ordered]] = {}
        scores: dict[int, ScoreHistogram] = {}
        for site in anatomy.sites:
            if site.name in energies:
                W_ON = weight_of(model.get_submodule(site.name)).detach()
                energy_N = energies[site.name].to(W_ON.device)
                try:
                    scores.setdefault(site.block, ScoreHistogram()).update(wanda.scores(W_ON, energy_N))
                    by_block.setdefault(site.block, []).append(Ordered.of(site, W_ON, energy_N, pruner))
                except ValueError as error:
                    raise ParedError(f"site {site.name}: {error}") from error
        self.blocks = tuple(by_block)
        self._units = tuple(tuple(sites) for sites in by_block.values())
        self._scores: Sequence[Scores] = [
            scores[block].scores().scaled(math.sqrt(SCORE_TOKENS)) for block in self.blocks
        ]
        sizes = [sum(one.dense_ON.numel() for one in unit) for unit in self._units]
        self._sizes_L = torch.tensor(sizes, dtype=torch.float64)

    def sparsities(self, program: Program) -> torch.Tensor | None:
        """Return the sparsity of every block, float64 ``(L,)``; None if the program is rejected."""
        return judge(program, self._scores, self.sparsity, self._sizes_L).sparsities_L

    def allocate(self, program: Program) -> Allocation | None:
        """Return the zeros of every site; None if the program is rejected."""
        sparsities_L = self.sparsities(program)
        return None if sparsities_L is None else self._zeros(sparsities_L.tolist())

    def uniform(self) -> Allocation:
        """Return the zeros of every site at the same sparsity."""
        return self._zeros([self.sparsity] * len(self._units))

    def shares(self, program: Program) -> dict[str, float]:
        """Return the sparsity of every block by its number, for the record."""
        sparsities_L = self.sparsities(program)
        assert sparsities_L is not None
        return {str(block): share for block, share in zip(self.blocks, sparsities_L.tolist(), strict=True)}

    def installed(self, allocation: Allocation) -> AbstractContextManager[None]:
        """Have the zeros in the model for the length of a ``with`` block."""
        ordered = (one for unit in self._units for one in unit)
        weights = ((one.site.name, one.pruned(zeros)) for one, zeros in zip(ordered, allocation, strict=True))
        return patched(self.model, weights)

    def _zeros(self, sparsities: Sequence[float]) -> Allocation:
        return tuple(
            Unstructured(sparsity).zeros(one.rivals)
            for sparsity, unit in zip(sparsities, self._units, strict=True)
            for one in unit
        )
