"""Fitting what follows a basis to the inputs that the compressed model really has."""

from collections.abc import Callable, Iterator

import torch
from torch import nn

from pared.calibration import WalkedBlock, cross_of
from pared.engine.install import dense_linear, factors_of
from pared.engine.solve import Solver
from pared.lowrank import Factors
from pared.lowrank.dense_path import mixed_cross
from pared.lowrank.sharing import refit
from pared.modules import LowRankLinear, PivotedLinear, replace_module
from pared.schema.plan import Plan
from pared.structure import Anatomy
from pared.structure.state import copy_block

Grams = tuple[torch.Tensor, torch.Tensor]  # of what a site reads, and of that with what its targets are made from


def update(model: nn.Module, solver: Solver, plan: Plan, walked: Iterator[WalkedBlock], share: float) -> None:
    """Fit the coefficients of all units at once, from one walk over the compressed, not yet updated model.

    Basis Sharing's update for small budgets (section 3.3): the members of a group take the sum of their Grams.

    Args:
        model: compressed; its ``up`` weights are changed in place.
        solver: that compressed it and still holds the dense weights.
        plan: that it was compressed by.
        walked: every block with the ``mean_gram`` of what its sites read, and ``cross`` if the dense model goes beside.
        share: of what the dense model puts out in the targets.
    """
    waiting = [unit for unit, _ in solver.decided(plan)]
    grams: dict[str, Grams] = {}
    for block in walked:  # a block has handed its outputs on by now, so that changing it changes no later input
        grams |= _grams(block, share)
        for unit in [unit for unit in waiting if all(site.name in grams for site in unit.members)]:
            waiting.remove(unit)
            gram_NN, cross_NN = (
                torch.stack(of_members).sum(dim=0)
                for of_members in zip(*(grams.pop(site.name) for site in unit.members), strict=True)
            )
            for site in unit.members:
                fit(model, site.name, solver.dense_weight(site.name), gram_NN, cross_NN)


def sequential(model: nn.Module, solver: Solver, plan: Plan, walked: Iterator[WalkedBlock], share: float) -> None:
    """Fit block after block, each to what it reads behind the blocks already fitted; every site to its own inputs.

    Where the walk observes the compressed block, those inside it are what its compressed layers put out, as they will
    be. Where it observes the dense block, as SVD-LLM's released code does, only the block's own input is that of the
    compressed model, and o, gate, up and down are fitted to what the dense layers before them put out.

    Args:
        model: compressed; its ``up`` weights are changed in place.
        solver: that compressed it and still holds the dense weights.
        plan: that it was compressed by.
        walked: as for :func:`update`, of a sequential walk.
        share: of what the dense model puts out in the targets.
    """
    decided = {site.name for unit, _ in solver.decided(plan) for site in unit.members}
    for block in walked:
        for name, (gram_NN, cross_NN) in _grams(block, share).items():
            if name in decided:
                fit(model, name, solver.dense_weight(name), gram_NN, cross_NN)


def dense_blocks(model: nn.Module, anatomy: Anatomy, solver: Solver, plan: Plan) -> Callable[[int], nn.Module]:
    """Return what makes the dense block of an index out of the compressed one and the dense weights that were kept."""
    decided = {site.name for unit, _ in solver.decided(plan) for site in unit.members}

    def dense_block(index: int) -> nn.Module:
        block = copy_block(anatomy.blocks(model)[index], anatomy.block_name(index))
        for site in anatomy.sites_of(index):
            if site.name in decided:
                dense = dense_linear(model.get_submodule(site.name), solver.dense_weight(site.name))
                replace_module(block, anatomy.path_in_block(site), dense)
        return block

    return dense_block


def _grams(block: WalkedBlock, share: float) -> dict[str, Grams]:
    found = {}
    for name, own in block.statistics.items():
        gram, cross = own["mean_gram"], cross_of(own, "mean_gram")
        if gram.tokens:
            targets_NN = gram.value if cross is None else mixed_cross(gram.value, cross.value, share)
            found[name] = gram.tokens * gram.value, gram.tokens * targets_NN
    return found


@torch.no_grad()
def fit(model: nn.Module, name: str, W_ON: torch.Tensor, gram_NN: torch.Tensor, cross_NN: torch.Tensor) -> None:
    """Replace the ``up`` of a low-rank module by the least-squares one, which never has the greater error.

    Args:
        model: changed in place.
        name: of the module.
        W_ON: the dense weight ``(out, in)`` it stands for.
        gram_NN: of what it reads in the compressed model.
        cross_NN: of that with what its targets are made from.
    """
    module = model.get_submodule(name)
    assert isinstance(module, (LowRankLinear, PivotedLinear))
    factors = Factors(*(factor.to(gram_NN.device) for factor in factors_of([module])))
    module.up.weight.copy_(refit(W_ON.to(gram_NN.device), factors, gram_NN, cross_NN))
