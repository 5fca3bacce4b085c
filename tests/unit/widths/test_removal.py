"""Taking channels out: the identities of the curve and of the compensated weight, in float64."""

from itertools import combinations, pairwise

import pytest
import torch

from pared.widths import Channels, remove_channels
from pared.widths.removal import _order_of_blocks


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def gram(features: int, seed: int = 1) -> torch.Tensor:
    X_TN = draw(3 * features, features, seed=seed) @ torch.diag(torch.linspace(0.3, 2, features, dtype=torch.float64))
    X_TN = X_TN + 0.6 * X_TN.roll(1, dims=1)  # neighbours are correlated
    return X_TN.T @ X_TN / len(X_TN)


def problem(out: int = 5, channels: int = 12) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return a weight, the Gram of its inputs, and a root of the Gram of its output gradients."""
    return draw(out, channels), gram(channels), torch.linalg.cholesky(gram(out, seed=3))


def loss(W_ON: torch.Tensor, A_NN: torch.Tensor, L_OO: torch.Tensor, kept_K: torch.Tensor, W_OK: torch.Tensor) -> float:
    """Return ½ tr(B D A Dᵀ) of a weight that reads some of the channels."""
    D_ON = -W_ON.clone()
    D_ON[:, kept_K] += W_OK
    B_OO = L_OO.square().diag() if L_OO.ndim == 1 else L_OO @ L_OO.T
    return 0.5 * float(torch.trace(B_OO @ D_ON @ A_NN @ D_ON.T))


def compensated(W_ON: torch.Tensor, A_NN: torch.Tensor, kept: list[int]) -> torch.Tensor:
    """Return the weight by the formula of the module, written out."""
    gone = [j for j in range(W_ON.shape[1]) if j not in kept]
    return W_ON[:, kept] + W_ON[:, gone] @ A_NN[gone][:, kept] @ torch.linalg.inv(A_NN[kept][:, kept])


@pytest.mark.parametrize("diagonal", [False, True])
@pytest.mark.parametrize("chunk", [1, 4])
def test_the_predicted_loss_is_that_of_the_weight_that_is_returned(chunk: int, diagonal: bool):
    W_ON, A_NN, L_OO = problem()
    L_OO = L_OO.diagonal().clone() if diagonal else L_OO
    found = remove_channels(W_ON, A_NN, L_OO, chunk=chunk)
    for width in range(13):
        kept_K, W_OK = found.kept(width), found.weight(width)
        assert W_OK.shape == (5, width)
        assert found.loss(width) == pytest.approx(loss(W_ON, A_NN, L_OO, kept_K, W_OK), rel=1e-8, abs=1e-12)
        assert torch.allclose(W_OK, compensated(W_ON, A_NN, kept_K.tolist()), rtol=1e-9, atol=1e-10)


def test_no_other_weight_on_the_same_channels_costs_less():
    W_ON, A_NN, L_OO = problem()
    found = remove_channels(W_ON, A_NN, L_OO)
    kept_K, W_OK = found.kept(7), found.weight(7)
    for seed in range(20):
        other_OK = W_OK + 1e-3 * draw(5, 7, seed=seed)
        assert loss(W_ON, A_NN, L_OO, kept_K, other_OK) > found.loss(7)


def test_all_channels_kept_is_the_model():
    W_ON, A_NN, L_OO = problem()
    found = remove_channels(W_ON, A_NN, L_OO)
    assert torch.equal(found.kept(12), torch.arange(12))
    assert torch.equal(found.weight(12), W_ON)
    assert found.loss(12) == 0


def test_a_channel_that_nothing_reads_costs_nothing_and_changes_nothing():
    W_ON, A_NN, L_OO = problem()
    W_ON[:, 5] = 0
    found = remove_channels(W_ON, A_NN, L_OO)
    assert found.order_G[-1] == 5
    assert found.loss(11) == 0
    assert torch.equal(found.weight(11), W_ON[:, found.kept(11)])


def test_of_two_equal_channels_one_goes_free():
    W_ON, A_NN, L_OO = problem()
    X_TN = draw(60, 12, seed=7)
    X_TN[:, 8] = X_TN[:, 2]
    A_NN = X_TN.T @ X_TN / 60
    A_NN.diagonal().add_(1e-9)  # what makes it positive definite
    for chunk in (1, 4):
        found = remove_channels(W_ON, A_NN, L_OO, chunk=chunk)
        gone, width = int(found.order_G[-1]), 11
        assert gone in (2, 8)
        assert found.loss(width) < 1e-7 < found.loss(width - 1)
        other = int(found.kept(width).tolist().index(10 - gone))
        assert torch.allclose(found.weight(width)[:, other], W_ON[:, 2] + W_ON[:, 8], atol=1e-6)


def test_the_loss_never_falls_as_channels_go():
    losses = [remove_channels(*problem()).loss(width) for width in range(13)]
    assert all(more <= fewer for fewer, more in pairwise(losses))
    W_ON, A_NN, L_OO = problem()
    assert losses[0] == pytest.approx(0.5 * float(torch.trace(L_OO @ L_OO.T @ W_ON @ A_NN @ W_ON.T)))


def test_greedy_elimination_is_close_to_the_best_subset():
    """All subsets of six channels: exact where one goes, within 1.4 times elsewhere."""
    W_ON, A_NN, L_OO = problem(out=4, channels=6)
    found = remove_channels(W_ON, A_NN, L_OO)
    for width in range(1, 6):
        best = min(
            loss(W_ON, A_NN, L_OO, torch.tensor(kept), compensated(W_ON, A_NN, list(kept)))
            for kept in combinations(range(6), width)
        )
        assert best <= found.loss(width) * (1 + 1e-9)
        assert found.loss(width) <= best * (1 + 1e-9 if width == 5 else 1.4)


def by_the_book(W_ON: torch.Tensor, A_NN: torch.Tensor, L_OO: torch.Tensor) -> list[int]:
    """Return the channels in the order in which they go, each chosen by what every one of those left would add."""
    kept, gone = list(range(W_ON.shape[1])), []
    while len(kept) > 1:

        def left(j: int) -> float:
            rest = [k for k in kept if k != j]
            return loss(W_ON, A_NN, L_OO, torch.tensor(rest), compensated(W_ON, A_NN, rest))

        j = min(kept, key=left)
        kept.remove(j)
        gone.append(j)
    return gone


def test_one_channel_at_a_time_is_greedy_elimination_by_what_each_adds():
    W_ON, A_NN, L_OO = problem()
    expected = by_the_book(W_ON, A_NN, L_OO)
    assert remove_channels(W_ON, A_NN, L_OO, chunk=1).order_G.flip(0)[:-1].tolist() == expected
    whole = remove_channels(W_ON, A_NN, L_OO, chunk=3, pool=4)  # the pool is everything there is
    assert whole.order_G.flip(0)[:-1].tolist() == expected


def test_chunks_cost_little_more_than_one_channel_at_a_time():
    W_ON, A_NN, L_OO = draw(16, 96), gram(96), torch.linalg.cholesky(gram(16, seed=3))
    one, chunks = (remove_channels(W_ON, A_NN, L_OO, chunk=chunk) for chunk in (1, 16))
    for width in (24, 48, 72, 90):
        assert chunks.loss(width) <= 1.02 * one.loss(width)


def test_it_may_stop_at_a_width():
    W_ON, A_NN, L_OO = problem()
    whole, stopped = remove_channels(W_ON, A_NN, L_OO), remove_channels(W_ON, A_NN, L_OO, least=6)
    assert torch.equal(whole.kept(6), stopped.kept(6))
    assert stopped.loss(6) == pytest.approx(whole.loss(6))
    assert sorted(stopped.order_G.tolist()) == list(range(12))


def test_scaling_the_channels_changes_nothing():
    W_ON, A_NN, L_OO = problem()
    scale_N = torch.linspace(0.1, 10, 12, dtype=torch.float64)
    plain = remove_channels(W_ON, A_NN, L_OO)
    scaled = remove_channels(W_ON / scale_N, scale_N[:, None] * A_NN * scale_N, L_OO)
    assert torch.equal(plain.order_G, scaled.order_G)
    assert scaled.loss(5) == pytest.approx(plain.loss(5))
    assert torch.allclose(scaled.weight(5) * scale_N[scaled.kept(5)], plain.weight(5))


def test_a_gram_that_is_not_positive_definite_is_an_error():
    W_ON, A_NN, L_OO = problem()
    A_NN[0] = A_NN[:, 0] = 0
    with pytest.raises(ValueError, match="Gram of 12 channels is not positive definite"):
        remove_channels(W_ON, A_NN, L_OO)


def test_a_weight_in_half_precision_is_computed_in_float64():
    W_ON, A_NN, L_OO = problem()
    found = remove_channels(W_ON.bfloat16(), A_NN.float(), L_OO)
    assert isinstance(found, Channels)
    assert found.weight(4).dtype == found.costs_N.dtype == torch.float64


def expanded(channels: list[int], inputs: int) -> list[int]:
    return [channel * inputs + number for channel in channels for number in range(inputs)]


@pytest.mark.parametrize("diagonal", [False, True])
def test_with_several_inputs_a_channel_the_predicted_loss_is_that_of_the_weight(diagonal: bool):
    W_ON, A_NN, L_OO = problem()
    L_OO = L_OO.diagonal().clone() if diagonal else L_OO
    found = remove_channels(W_ON, A_NN, L_OO, inputs=3)
    assert sorted(found.order_G.tolist()) == [0, 1, 2, 3]
    for width in range(5):
        kept, W_OK = expanded(found.kept(width).tolist(), 3), found.weight(width)
        assert W_OK.shape == (5, 3 * width)
        assert found.loss(width) == pytest.approx(loss(W_ON, A_NN, L_OO, torch.tensor(kept, dtype=torch.long), W_OK))
        assert torch.allclose(W_OK, compensated(W_ON, A_NN, kept), rtol=1e-9, atol=1e-10)
    assert torch.equal(found.weight(4), W_ON)


def test_channels_of_several_inputs_go_by_what_each_adds():
    W_ON, A_NN, L_OO = draw(5, 24), gram(24), torch.linalg.cholesky(gram(5, seed=3))
    found = remove_channels(W_ON, A_NN, L_OO, inputs=4)
    kept, gone = list(range(6)), []
    while len(kept) > 1:

        def left(j: int) -> float:
            rest = expanded([k for k in kept if k != j], 4)
            return loss(W_ON, A_NN, L_OO, torch.tensor(rest), compensated(W_ON, A_NN, rest))

        j = min(kept, key=left)
        assert found.loss(len(kept) - 1) == pytest.approx(left(j))
        kept.remove(j)
        gone.append(j)
    assert found.order_G.flip(0)[:-1].tolist() == gone
    assert found.order_G[0] == kept[0]


def test_a_channel_whose_inputs_nothing_reads_costs_nothing():
    W_ON, A_NN, L_OO = problem()
    W_ON[:, 3:6] = 0
    found = remove_channels(W_ON, A_NN, L_OO, inputs=3)
    assert found.order_G[-1] == 1
    assert found.loss(3) == 0
    assert torch.equal(found.weight(3), W_ON[:, expanded([0, 2, 3], 3)])


def test_one_input_as_a_block_is_a_channel():
    W_ON, A_NN, L_OO = problem()
    order_G = _order_of_blocks(torch.linalg.cholesky(L_OO @ L_OO.T).T @ W_ON, torch.linalg.inv(A_NN), 1, 0)
    assert torch.equal(order_G, remove_channels(W_ON, A_NN, L_OO, chunk=1).order_G)


def test_blocks_may_stop_at_a_width():
    W_ON, A_NN, L_OO = problem()
    whole, stopped = (remove_channels(W_ON, A_NN, L_OO, inputs=2, least=least) for least in (0, 4))
    assert torch.equal(whole.kept(4), stopped.kept(4))
    assert stopped.loss(4) == pytest.approx(whole.loss(4))
    assert sorted(stopped.order_G.tolist()) == list(range(6))
