"""The root of a Gram weights outputs without being held, and what was made with it is what the root itself gives."""

import pytest
import torch

from pared.lowrank import in_place, loss_optimal
from pared.lowrank.whitening import LEAST_PIVOT

LADDER = (1e-4, 1e-3, 1e-2)


def gram(size: int, tokens: int = 200) -> torch.Tensor:
    x_TN = torch.randn(tokens, size, dtype=torch.float64, generator=torch.Generator().manual_seed(size))
    G_NN = x_TN.T @ x_TN
    return (G_NN + G_NN.T) / 2


def weight(rows: int, columns: int = 10) -> torch.Tensor:
    return torch.randn(rows, columns, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def damped(G_NN: torch.Tensor, damping: float) -> torch.Tensor:
    return G_NN + damping * G_NN.diagonal().mean() * torch.eye(len(G_NN), dtype=torch.float64)


@pytest.mark.parametrize("panel", [1, 7, 16, 64])
@pytest.mark.parametrize("size", [1, 16, 50])
def test_the_root_weights_as_a_cholesky_factor_does_and_the_gram_is_left_as_it_was(
    size: int, panel: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(in_place, "PANEL", panel)
    G_NN, W_NM = gram(size), weight(size)
    before = G_NN.clone()
    found = in_place.weighted_by_root(G_NN, W_NM, LADDER, LEAST_PIVOT)
    assert found is not None
    weighted_NM, damping = found
    assert torch.equal(G_NN, before)
    assert damping == LADDER[0]
    torch.testing.assert_close(weighted_NM, torch.linalg.cholesky(damped(G_NN, damping)).T @ W_NM)


def test_an_indefinite_gram_climbs_the_ladder_and_is_put_back_every_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(in_place, "PANEL", 8)
    G_NN = gram(40, tokens=3)
    G_NN -= 5e-3 * G_NN.diagonal().mean() * torch.eye(40, dtype=torch.float64)
    before, W_NM = G_NN.clone(), weight(40)
    found = in_place.weighted_by_root(G_NN, W_NM, LADDER, LEAST_PIVOT)
    assert found is not None
    assert found[1] == 1e-2
    torch.testing.assert_close(found[0], torch.linalg.cholesky(damped(G_NN, 1e-2)).T @ W_NM)
    assert in_place.weighted_by_root(G_NN, W_NM, LADDER[:2], LEAST_PIVOT) is None
    assert torch.equal(G_NN, before)


@pytest.mark.parametrize("members", [1, 2])
@pytest.mark.parametrize("rank", [3, 9])  # the last of 10 inputs are next to nothing: weak directions
def test_a_tall_weight_is_that_of_the_best_directions_of_the_weighted_one(rank: int, members: int) -> None:
    """``W' = L⁻ᵀ U_k U_kᵀ Lᵀ W`` of the definition, computed with the root that is never held."""
    weights = [weight(30) + index for index in range(members)]
    A_NN = gram(10)
    A_NN[-4:] *= 1e-9
    A_NN[:, -4:] *= 1e-9
    for W_ON in weights:
        W_ON[:, -4:] *= 1e-7
    B = [gram(30) * (1 + index) for index in range(members)]
    found = loss_optimal.decompose_group(weights, A_NN, B)
    assert found.L_OO is None
    assert found.weak(rank) == (rank == 9)
    L_OO = torch.block_diag(*(torch.linalg.cholesky(damped(one, loss_optimal.DAMPING)) for one in B))
    W_ON, R_NN = torch.cat(weights), torch.linalg.cholesky(damped(A_NN, loss_optimal.DAMPING))
    U_OK = torch.linalg.svd(L_OO.T @ W_ON @ R_NN).U[:, :rank]
    expected_ON = torch.linalg.solve(L_OO.T, U_OK @ (U_OK.T @ L_OO.T @ W_ON))
    down, up = found.factors(rank)
    assert float((L_OO.T @ (up @ down - expected_ON) @ R_NN).norm()) < 1e-6 * float((L_OO.T @ W_ON @ R_NN).norm())


def test_damping_beyond_the_usual_is_told() -> None:
    B_OO = gram(30, tokens=3)
    B_OO -= 5e-4 * B_OO.diagonal().mean() * torch.eye(30, dtype=torch.float64)
    assert loss_optimal.decompose(weight(30), gram(10), B_OO).damping == 1e-3
    B_OO -= 10 * B_OO.diagonal().mean() * torch.eye(30, dtype=torch.float64)
    with pytest.raises(ValueError, match="expected a positive number"):
        loss_optimal.decompose(weight(30), gram(10), B_OO)
