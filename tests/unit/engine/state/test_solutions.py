"""Decompositions on the disk are what they were."""

import pytest
import torch

from pared.engine.state.solutions import DecompositionStore
from pared.lowrank import METHODS, loss_optimal


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("form", ["none", "diagonal", "full"])
def test_a_stored_decomposition_gives_the_same_factors(form: str) -> None:
    W_ON, A_NN, B_OO = draw(6, 9), draw(9, 9).square() + 9 * torch.eye(9), draw(6, 6).square() + 6 * torch.eye(6)
    A_NN, B_OO = A_NN @ A_NN.T, B_OO @ B_OO.T
    if form == "none":
        found = METHODS["svd-llm"].decompose(W_ON, {"gram": A_NN})
    else:
        found = loss_optimal.decompose(W_ON, A_NN, B_OO if form == "full" else B_OO.diagonal())
    with DecompositionStore() as store:
        store.put("a", found)
        again = store.get("a", W_ON)
        assert torch.equal(store.spectra["a"], found.singular_values_R)
    ours, theirs = again.factors(3), found.factors(3)
    assert torch.allclose(ours.up @ ours.down, theirs.up @ theirs.down, atol=1e-5)
