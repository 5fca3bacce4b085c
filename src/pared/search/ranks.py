"""Ranks for candidates: every site is decomposed once, and a candidate is one product of leading directions."""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import replace

import torch
from transformers import PreTrainedModel

from pared.allocation import Budget, Evidence, Unit
from pared.allocation.dsa import Program
from pared.allocation.rank_budget import split_fixed
from pared.allocation.ranks.dsa import by_program, ranks_from_fractions
from pared.engine.install import patched
from pared.engine.observe import Observer
from pared.engine.ranks.decompose import decompose_sites
from pared.engine.spec import LowRankSpec
from pared.errors import ParedError
from pared.lowrank import Decomposition
from pared.names import called
from pared.schema.plan import LowRank
from pared.search.evidence import Tensors
from pared.search.evolution import Allocation
from pared.structure import Anatomy


def require_rankable(spec: LowRankSpec) -> None:
    """Refuse a low-rank spec whose candidates are not decided by ranks of single sites.

    Raises:
        ParedError: it has another budget, or its method shares bases.
    """
    if spec.budget.rank_fraction is not None:
        raise ParedError(
            f"a search spreads a budget of parameters ({called('keep', '0.8')}); rank_fraction fixes every rank"
        )
    if spec.structures != "ranks":
        raise ParedError(
            f"a search finds ranks, got structures {spec.structures}; take {called('structures', 'ranks')}"
        )
    if spec.group_size != 1:
        raise ParedError(
            f"method {spec.method.name} lets neighbouring blocks share, so that they have no ranks of their own; "
            "search with svd-llm and use the program with it"
        )


def decompositions(observer: Observer) -> Tensors:
    """Return ``.up (out, R)`` and ``.down (R, in)``, float32, and ``.spectrum (R,)`` of every site a token reached.

    Args:
        observer: of a low-rank spec, that has probed the dense model and read the tokens.

    Raises:
        ParedError: a weight or its statistics cannot be decomposed; names the site.
    """
    spec, found = observer.spec, Tensors()
    assert isinstance(spec, LowRankSpec)

    def take(name: str, one: Decomposition) -> None:
        factors = one.factors(len(one.singular_values_R))
        found[f"{name}.up"], found[f"{name}.down"] = factors.up.float(), factors.down.float()
        found[f"{name}.spectrum"] = one.singular_values_R

    decompose_sites(observer, spec.solving, take)
    return found


class RanksTrial:
    """A model whose candidates are ranks. Satisfies :class:`pared.search.objective.Trial`.

    An allocation holds, for every site, its rank, or 0 where it stays dense. Memory beside the model: all
    directions of the covered weights in float32, and while a candidate is in place a copy of what it replaces.

    Attributes:
        model: dense.
    """

    def __init__(self, model: PreTrainedModel, anatomy: Anatomy, found: Mapping[str, torch.Tensor], budget: Budget):
        """Take what :func:`decompositions` found.

        Args:
            model: dense.
            anatomy: after the probe pass.
            found: factors and spectra; a site that is missing stays dense and counts as such.
            budget: the fraction to keep, and what a rank costs.
        """
        self.model, self._budget = model, budget
        known = [f"{site.name}.spectrum" in found for site in anatomy.sites]
        self._units = [Unit((replace(s, idle=not there),)) for s, there in zip(anatomy.sites, known, strict=True)]
        self._evidence = Evidence({u.name: found[f"{u.name}.spectrum"] for u in self._units if not u.idle})
        self._factors = {u.name: (found[f"{u.name}.up"], found[f"{u.name}.down"]) for u in self._units if not u.idle}

    def allocate(self, program: Program) -> Allocation | None:
        """Return the rank of every site; None if the program is rejected."""
        decisions, _ = by_program(self._units, self._budget, self._evidence, program)
        return self._ranks(decisions) if decisions else None

    def uniform(self) -> Allocation:
        """Return the ranks at the same share of every site's parameters."""
        open_units, fixed, left = split_fixed(self._units, self._budget)
        keep = left / sum(unit.parameters for unit in open_units)
        return self._ranks(
            fixed | ranks_from_fractions(open_units, {u.block: keep for u in open_units}, left, self._budget)
        )

    def shares(self, program: Program) -> dict[str, float]:
        """Return the share that a valid program takes from every block, by its number, for the record."""
        _, verdict = by_program(self._units, self._budget, self._evidence, program)
        open_units, _, _ = split_fixed(self._units, self._budget)
        assert verdict.sparsities_L is not None
        blocks = sorted({unit.block for unit in open_units})
        return {str(block): share for block, share in zip(blocks, verdict.sparsities_L.tolist(), strict=True)}

    def installed(self, allocation: Allocation) -> AbstractContextManager[None]:
        """Have the ranks in the model, as dense weights, for the length of a ``with`` block."""
        chosen = [(unit.name, rank) for unit, rank in zip(self._units, allocation, strict=True) if rank]
        weights = ((name, self._of_rank(name, rank)) for name, rank in chosen)
        return patched(self.model, weights)

    def _of_rank(self, name: str, rank: int) -> torch.Tensor:
        up_OR, down_RN = self._factors[name]
        return up_OR[:, :rank] @ down_RN[:rank]

    def _ranks(self, decisions: Mapping[str, object]) -> Allocation:
        chosen = (decisions[unit.name] for unit in self._units)
        return tuple(one.rank if isinstance(one, LowRank) else 0 for one in chosen)
