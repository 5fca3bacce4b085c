"""Fitting what follows a basis to the inputs that the compressed model really has."""

from collections.abc import Iterator

import torch
from torch import nn

from pared.calibration import WalkedBlock
from pared.engine.solver import Solver
from pared.install import factors_of
from pared.lowrank.sharing import refit
from pared.modules import LowRankLinear, PivotedLinear
from pared.plan import Plan


def update(model: nn.Module, solver: Solver, plan: Plan, walked: Iterator[WalkedBlock]) -> None:
    """Fit the coefficients of all units at once, from one walk over the compressed, not yet updated model.

    Basis Sharing's update for small budgets (section 3.3): the members of a group take the sum of their Grams.

    Args:
        model: compressed; its ``up`` weights are changed in place.
        solver: that compressed it and still holds the dense weights.
        plan: that it was compressed by.
        walked: every block with the ``gram`` of what its sites read.
    """
    waiting = [unit for unit, _ in solver.decided(plan)]
    grams: dict[str, torch.Tensor] = {}
    for block in walked:  # a block has handed its outputs on by now, so that changing it changes no later input
        grams |= _grams(block)
        for unit in [unit for unit in waiting if all(site.name in grams for site in unit.members)]:
            waiting.remove(unit)
            gram_NN = torch.stack([grams.pop(site.name) for site in unit.members]).sum(dim=0)
            for site, W_ON in zip(unit.members, solver.dense_weights(unit), strict=True):
                fit(model, site.name, W_ON, gram_NN)


def sequential(model: nn.Module, solver: Solver, plan: Plan, walked: Iterator[WalkedBlock]) -> None:
    """Fit block after block, each to what it reads behind the blocks already fitted; every site to its own inputs.

    Args:
        model: compressed; its ``up`` weights are changed in place.
        solver: that compressed it and still holds the dense weights.
        plan: that it was compressed by.
        walked: every block of a sequential walk with the ``gram`` of what its sites read.
    """
    unit_of = {site.name: unit for unit, _ in solver.decided(plan) for site in unit.members}
    for block in walked:
        for name, gram_NN in _grams(block).items():
            if unit := unit_of.get(name):
                place = [site.name for site in unit.members].index(name)
                fit(model, name, solver.dense_weights(unit)[place], gram_NN)


def _grams(block: WalkedBlock) -> dict[str, torch.Tensor]:
    return {name: own["gram"].value for name, own in block.statistics.items() if own["gram"].tokens}


@torch.no_grad()
def fit(model: nn.Module, name: str, W_ON: torch.Tensor, gram_NN: torch.Tensor) -> None:
    """Replace the ``up`` of a low-rank module by the least-squares one on the inputs of this Gram.

    Args:
        model: changed in place.
        name: of the module.
        W_ON: the dense weight ``(out, in)`` it stands for.
        gram_NN: of what it reads in the compressed model.
    """
    module = model.get_submodule(name)
    assert isinstance(module, (LowRankLinear, PivotedLinear))
    module.up.weight.copy_(refit(W_ON, factors_of([module]), gram_NN, gram_NN))
