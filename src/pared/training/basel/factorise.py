"""From bases that are left to two factors, or to the weight as it is where factors would be no smaller."""

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from pared.engine.install import install
from pared.lowrank import Factors
from pared.modules import replace_module
from pared.schema.plan import Dense, LowRank
from pared.training.basel.layer import NEGLIGIBLE, BasisLinear


def factors_of(layer: BasisLinear) -> Factors:
    """Return ``up = U_k``, ``down = diag(S_k) Vᵀ_k`` of the weight as it is, k the directions that matter."""
    U_ON, S_N, V_NN = torch.linalg.svd(layer.effective_weight().double(), full_matrices=False)
    rank = max(1, min(int((S_N / S_N.mean() > NEGLIGIBLE).sum()), layer.rank))
    return Factors(S_N[:rank, None] * V_NN[:rank], U_ON[:, :rank])


def put_back(model: nn.Module, name: str, was: type[nn.Module]) -> Dense | LowRank:
    """Put what a layer has become where it stands, in the layer's own precision, float32.

    Args:
        model: the whole model, changed in place.
        name: of a ``BasisLinear`` in it.
        was: the class that stood there before.

    Returns:
        The decision, for the plan.
    """
    layer = model.get_submodule(name)
    assert isinstance(layer, BasisLinear)
    factors = factors_of(layer)
    rank, (m, n) = len(factors.down), (layer.out_features, layer.in_features)
    replace_module(model, name, _dense(layer, was))
    if rank * (m + n) >= m * n:
        return Dense(reason=f"{rank} bases are no smaller than the weight")
    install(model, name, factors)
    return LowRank(rank=rank)


@torch.no_grad()
def _dense(layer: BasisLinear, was: type[nn.Module]) -> nn.Module:
    """Return the weight as it is, in a layer of the class that stood there."""
    W_ON = layer.effective_weight()
    if issubclass(was, Conv1D):
        new = Conv1D(layer.out_features, layer.in_features).to(W_ON.device)
        new.weight.copy_(W_ON.T)
        new.bias.copy_(layer.bias)
        return new
    linear = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, device=W_ON.device)
    linear.weight.copy_(W_ON)
    if layer.bias is not None:
        linear.bias.copy_(layer.bias)
    return linear
