"""Ranks for candidates: every site is decomposed once, and a candidate is one product of leading directions."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pared.allocation import Budget, Evidence, Unit
from pared.allocation.dsa import Program
from pared.allocation.rank_budget import set_aside
from pared.allocation.ranks.dsa import by_program, shared_out
from pared.calibration import per_token
from pared.data.windows import Windows
from pared.engine.observe import Passes
from pared.engine.spec import low_rank_of, options_of
from pared.errors import ParedError
from pared.progress import Progress
from pared.schema.plan import LowRank
from pared.schema.recipe import Recipe
from pared.search.evidence import Tensors
from pared.search.evolution import Allocation
from pared.structure import Anatomy, weight_of
from pared.structure.probe import BlockCall


def require_rankable(recipe: Recipe) -> None:
    """Refuse a low-rank recipe whose candidates are not decided by ranks of single sites.

    Raises:
        ParedError: it has another budget, or its method shares bases.
    """
    method = low_rank_of(recipe)
    if recipe.rank_fraction is not None:
        raise ParedError("a search spreads a budget of parameters (--keep 0.8); rank_fraction fixes every rank")
    if method.group_rule is not None and options_of(recipe).get("group_size", 1) != 1:
        raise ParedError(
            f"method {method.name} lets neighbouring blocks share, so that they have no ranks of their own; search "
            "with svd-llm and use the program with it"
        )


def decompositions(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    recipe: Recipe,
    anatomy: Anatomy,
    calls: list[BlockCall],
    windows: Windows,
    progress: Progress,
) -> Tensors:
    """Return ``.up (out, R)`` and ``.down (R, in)``, float32, and ``.spectrum (R,)`` of every site a token reached.

    Args:
        model: dense.
        tokenizer: of the model.
        recipe: of a low-rank method.
        anatomy: after the probe pass.
        calls: of the probe pass.
        windows: what is calibrated on.
        progress: who watches.

    Raises:
        ParedError: a weight or its statistics cannot be decomposed; names the site.
    """
    method, options = low_rank_of(recipe), options_of(recipe)
    passes = Passes(model, tokenizer, recipe, progress)
    inputs = passes.capture(anatomy, calls, windows) if method.calibrated else None
    found: Tensors = {}
    for walked in passes.statistics(anatomy, inputs, windows):
        for site in anatomy.sites_of(walked.index):
            own = walked.statistics.get(site.name, {})
            if site.idle or not all(one.tokens for one in own.values()):
                continue
            W_ON = weight_of(model.get_submodule(site.name)).detach()
            values = {name: per_token(name, statistic, passes.tokens) for name, statistic in own.items()}
            try:
                one = method.decompose(W_ON, values, options)
            except (ValueError, RuntimeError) as error:
                raise ParedError(f"site {site.name}: {error}") from error
            factors = one.factors(len(one.singular_values_R))
            found[f"{site.name}.up"], found[f"{site.name}.down"] = factors.up.float(), factors.down.float()
            found[f"{site.name}.spectrum"] = one.singular_values_R
    return found


class RanksTrial:
    """A model whose candidates are ranks. Satisfies :class:`pared.search.objective.Trial`.

    An allocation holds, for every site, its rank, or 0 where it stays dense. Memory beside the model: a copy of the
    covered weights, and all their directions in float32.

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
        self._dense = {name: weight_of(model.get_submodule(name)).detach().clone() for name in self._factors}

    def allocate(self, program: Program) -> Allocation | None:
        """Return the rank of every site; None if the program is rejected."""
        decisions, _ = by_program(self._units, self._budget, self._evidence, program)
        return self._ranks(decisions) if decisions else None

    def uniform(self) -> Allocation:
        """Return the ranks at the same share of every site's parameters."""
        open_units, fixed, left = set_aside(self._units, self._budget)
        keep = left / sum(unit.parameters for unit in open_units)
        return self._ranks(fixed | shared_out(open_units, {u.block: keep for u in open_units}, left, self._budget))

    def shares(self, program: Program) -> dict[str, float]:
        """Return the share that a valid program takes from every block, by its number, for the record."""
        _, verdict = by_program(self._units, self._budget, self._evidence, program)
        open_units, _, _ = set_aside(self._units, self._budget)
        assert verdict.sparsities_L is not None
        blocks = sorted({unit.block for unit in open_units})
        return {str(block): share for block, share in zip(blocks, verdict.sparsities_L.tolist(), strict=True)}

    @contextmanager
    @torch.no_grad()
    def installed(self, allocation: Allocation) -> Iterator[None]:
        """Have the ranks in the model, as dense weights, for the length of a ``with`` block."""
        try:
            for unit, rank in zip(self._units, allocation, strict=True):
                if rank:
                    up_OR, down_RN = self._factors[unit.name]
                    weight_of(self.model.get_submodule(unit.name)).copy_(up_OR[:, :rank] @ down_RN[:rank])
            yield
        finally:
            for name, dense_ON in self._dense.items():
                weight_of(self.model.get_submodule(name)).copy_(dense_ON)

    def _ranks(self, decisions: Mapping[str, object]) -> Allocation:
        chosen = (decisions[unit.name] for unit in self._units)
        return tuple(one.rank if isinstance(one, LowRank) else 0 for one in chosen)
