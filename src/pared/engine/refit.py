"""Fitting what follows a basis to the inputs that the compressed model really has."""

from collections.abc import Callable

import torch
from torch import nn

from pared.allocation import Unit
from pared.calibration import BlockStatistics, cross_of
from pared.engine.install import dense_linear, factors_of
from pared.engine.ranks.kept_units import KeptUnits
from pared.engine.state.pass_record import Record
from pared.lowrank import Factors
from pared.lowrank.dense_path import mixed_cross
from pared.lowrank.sharing import refit
from pared.modules import LowRankLinear, PivotedLinear, replace_module
from pared.processes import ALONE, Processes
from pared.schema.plan import Plan
from pared.structure import Anatomy
from pared.structure.state import copy_block

Grams = tuple[torch.Tensor, torch.Tensor]  # of what a site reads, and of that with what its targets are made from


class Refit:
    """Refits every ``up`` of a compressed model, block by block."""

    def __init__(
        self,
        model: nn.Module,
        units: KeptUnits,
        plan: Plan,
        together: bool,
        dense_path: float = 0.0,
        processes: Processes = ALONE,
    ) -> None:
        """Start.

        With ``together`` the members of a group are fitted to the sum of their Grams, all when the last was visited, as
        in Basis Sharing's update for small budgets (section 3.3), where no block reads what a fitted one outputs. Else
        every site is fitted to its own inputs, behind the blocks that are fitted already: those inside its block are
        what its compressed layers output, as they will be, or, where the dense block is observed, as in SVD-LLM's
        released code, what the dense layers output.

        Args:
            model: compressed; its ``up`` weights are changed in place.
            units: that it was compressed from, with their dense weights.
            plan: that it was compressed by.
            together: fit the members of a group at once.
            dense_path: share of the dense model's outputs in targets.
            processes: that fit together: each those whose dense weights it keeps.
        """
        self._processes = processes
        self._model, self._units = model, units
        decided = [unit for unit, _ in units.decided(plan)]
        self._waiting = decided if together else [Unit((site,)) for unit in decided for site in unit.members]
        self._grams: dict[str, Grams] = {}
        self._share = dense_path

    def take_up(self, record: Record) -> None:
        """Go on behind the blocks that an earlier process finished."""
        self._waiting = [unit for unit in self._waiting if not all(record.holds(s.block) for s in unit.members)]

    def visit(self, block: BlockStatistics) -> None:
        """Fit what can be fitted with this block's ``mean_gram``, and ``cross`` if the dense model runs alongside."""
        open_sites = {site.name for unit in self._waiting for site in unit.members}
        self._grams |= {name: found for name, found in _grams(block, self._share).items() if name in open_sites}
        ready = [unit for unit in self._waiting if all(site.name in self._grams for site in unit.members)]
        self._waiting = [unit for unit in self._waiting if unit not in ready]
        of_units = self._processes.each(ready, self._fit, lambda unit: self._units.owner_of(unit.name))
        for unit, ups in zip(ready, of_units, strict=True):
            for site, up_OK in zip(unit.members, ups, strict=True):
                self._grams.pop(site.name, None)  # of what another process has fitted
                with torch.no_grad():
                    self._model.get_parameter(f"{site.name}.up.weight").copy_(up_OK)

    def _fit(self, unit: Unit) -> list[torch.Tensor]:
        """Return what the ``up`` of every member becomes, in the dtype of its weight."""
        gram_NN, cross_NN = (
            of_members[0] if len(of_members) == 1 else torch.stack(of_members).sum(dim=0)
            for of_members in zip(*(self._grams.pop(site.name) for site in unit.members), strict=True)
        )
        dense = self._units.dense_weight
        return [fitted(self._model, site.name, dense(site.name), gram_NN, cross_NN) for site in unit.members]


def dense_blocks(
    model: nn.Module, anatomy: Anatomy, units: KeptUnits, plan: Plan, processes: Processes = ALONE
) -> Callable[[int], nn.Module]:
    """Return what makes the dense block of an index out of the compressed one and the dense weights that were kept.

    All processes ask for the same blocks in the same order.
    """
    decided = {site.name for unit, _ in units.decided(plan) for site in unit.members}

    def dense_block(index: int) -> nn.Module:
        block = copy_block(anatomy.blocks(model)[index], anatomy.block_name(index))
        sites = [site for site in anatomy.sites_of(index) if site.name in decided]
        weights = processes.each(
            sites, lambda site: units.dense_weight(site.name), lambda site: units.owner_of(site.name)
        )
        for site, W_ON in zip(sites, weights, strict=True):
            dense = dense_linear(model.get_submodule(site.name), W_ON)
            replace_module(block, anatomy.path_in_block(site), dense)
        return block

    return dense_block


def _grams(block: BlockStatistics, share: float) -> dict[str, Grams]:
    found = {}
    for name, own in block.statistics.items():
        gram, cross = own["mean_gram"], cross_of(own, "mean_gram")
        if gram.tokens:
            targets_NN = gram.value if cross is None else mixed_cross(gram.value, cross.value, share)
            found[name] = gram.tokens * gram.value, gram.tokens * targets_NN
    return found


@torch.no_grad()
def fitted(
    model: nn.Module, name: str, W_ON: torch.Tensor, gram_NN: torch.Tensor, cross_NN: torch.Tensor
) -> torch.Tensor:
    """Return the least-squares ``up`` of a low-rank module, which never has the greater error, as it is stored.

    Args:
        model: not changed.
        name: of the module.
        W_ON: the dense weight ``(out, in)`` it stands for.
        gram_NN: of what it reads in the compressed model.
        cross_NN: of that with what its targets are made from.
    """
    module = model.get_submodule(name)
    assert isinstance(module, (LowRankLinear, PivotedLinear))
    factors = Factors(*(factor.to(gram_NN.device) for factor in factors_of([module])))
    return refit(W_ON.to(gram_NN.device), factors, gram_NN, cross_NN).to(module.up.weight)
