"""Zeros for candidates: every site's scores are ordered once, and a mask is one comparison with that order."""

import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager

import torch
from transformers import PreTrainedModel

from pared.allocation.dsa import SCORE_TOKENS, Program, ScoreHistogram, Scores, evaluate_program
from pared.engine.install import patched
from pared.errors import ParedError
from pared.methods import METHODS, methods_of
from pared.names import called
from pared.schema.options import Options
from pared.search.evolution import Allocation
from pared.sparsity import OrderedWeights, PruningMethod, RankedWeights, Unstructured, wanda
from pared.structure import Anatomy, weight_of


def pruners() -> dict[str, PruningMethod]:
    """Return the pruners whose zeros can be had from scores of the dense model alone, by name."""
    found = methods_of("sparse")
    return {
        name: one
        for name, one in found.items()
        if isinstance(one, PruningMethod) and not one.updates and one.requires([(1, 1)], one.config()) <= {"energy"}
    }


def require_pruner(name: str) -> None:
    """Refuse a pruner whose zeros cannot be had from scores alone.

    Raises:
        ParedError: it is one; says what to do.
    """
    if name in pruners():
        return
    if name in METHODS:
        updates = getattr(METHODS[name], "updates", False)
        why = "changes the weights it keeps, block after block" if updates else "needs more than the energy of inputs"
        raise ParedError(
            f"pruner {name} {why}, so that a candidate costs a whole compression; search with wanda and use the "
            f"program with {called('method', name)} {called('allocation', 'dsa')}"
        )
    raise ParedError(f"unknown pruner {name!r}; expected one of {', '.join(pruners())}")


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
        pruner: PruningMethod,
        config: Options,
        sparsity: float,
    ) -> None:
        """Score and order all weights.

        Args:
            model: dense.
            anatomy: after the probe pass.
            energies: E[x²] of every input feature, by site; a site that is missing stays dense and is not counted.
            pruner: one of :func:`pruners`.
            config: its options.
            sparsity: of the covered weights.

        Raises:
            ParedError: an energy or a weight is not finite.
        """
        self.model, self.sparsity = model, sparsity
        by_block: dict[int, list[tuple[str, OrderedWeights]]] = {}
        scores: dict[int, ScoreHistogram] = {}
        for site in anatomy.sites:
            if site.name in energies:
                W_ON = weight_of(model.get_submodule(site.name)).detach()
                energy_N = energies[site.name].to(W_ON.device)
                try:
                    scores.setdefault(site.block, ScoreHistogram()).update(wanda.scores(W_ON, energy_N))
                    ordered = _ordered(pruner, config, W_ON.clone(), energy_N)
                except ValueError as error:
                    raise ParedError(f"site {site.name}: {error}") from error
                by_block.setdefault(site.block, []).append((site.name, ordered))
        self.blocks = tuple(by_block)
        self._units = tuple(tuple(sites) for sites in by_block.values())
        self._scores: Sequence[Scores] = [
            scores[block].scores().scaled(math.sqrt(SCORE_TOKENS)) for block in self.blocks
        ]
        sizes = [sum(one.W_ON.numel() for _, one in unit) for unit in self._units]
        self._sizes_L = torch.tensor(sizes, dtype=torch.float64)

    def sparsities(self, program: Program) -> torch.Tensor | None:
        """Return the sparsity of every block, float64 ``(L,)``; None if the program is rejected."""
        return evaluate_program(program, self._scores, self.sparsity, self._sizes_L).sparsities_L

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
        weights = ((name, one.without(zeros)) for (name, one), zeros in zip(ordered, allocation, strict=True))
        return patched(self.model, weights)

    def _zeros(self, sparsities: Sequence[float]) -> Allocation:
        return tuple(
            Unstructured(sparsity).zeros(one.rivals)
            for sparsity, unit in zip(sparsities, self._units, strict=True)
            for _, one in unit
        )


def _ordered(pruner: PruningMethod, config: Options, W_ON: torch.Tensor, energy_N: torch.Tensor) -> OrderedWeights:
    """Return a weight in the order in which its pruner lets its entries go.

    Raises:
        ValueError: an energy or the weight is not finite, or the pruner has no such order.
    """
    solution = pruner.solve([W_ON], [{"energy": energy_N}], config)
    if not isinstance(solution, RankedWeights):
        raise ValueError(f"method {pruner.name} gives no ranked weights, and a search needs their order")
    return solution.ordered()
