"""FWSVD, ASVD and the loss-optimal method against their papers' forms, written out here on their own."""

import math

import pytest
import torch

from pared.errors import ParedError
from pared.lowrank import METHODS, asvd, fwsvd, loss_optimal, svd, whitening
from pared.lowrank.decomposition import Decomposition

SHAPES = [(6, 9), (9, 6), (7, 7)]


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def gram(features: int, seed: int = 1) -> torch.Tensor:
    X_TN = draw(5 * features, features, seed=seed) @ torch.diag(torch.linspace(0.2, 3, features, dtype=torch.float64))
    return X_TN.T @ X_TN / len(X_TN)


def cut(decomposition: Decomposition, rank: int) -> torch.Tensor:
    down, up = decomposition.factors(rank)
    assert down.shape[0] == up.shape[1] == rank
    return up @ down


def largest(x: torch.Tensor) -> float:
    return float(x.abs().max())


def truncated(A: torch.Tensor, rank: int) -> torch.Tensor:
    U, s, Vh = torch.linalg.svd(A, full_matrices=False)
    return U[:, :rank] * s[:rank] @ Vh[:rank]


@pytest.mark.parametrize("shape", SHAPES)
def test_fwsvd_is_the_papers_form(shape: tuple[int, int]):
    W_ON, fisher_N = draw(*shape), draw(shape[1], seed=2).square()
    scale = fisher_N.sqrt().diag()  # Î; the paper's W is ours transposed
    paper = torch.linalg.inv(scale) @ truncated(scale @ W_ON.T, 3)
    assert largest(cut(fwsvd.decompose(W_ON, fisher_N), 3) - paper.T) < 1e-9


@pytest.mark.parametrize("shape", SHAPES)
def test_constant_importance_is_the_plain_svd(shape: tuple[int, int]):
    W_ON = draw(*shape)
    plain = cut(svd.decompose(W_ON), 3)
    assert largest(cut(fwsvd.decompose(W_ON, torch.full((shape[1],), 7.0)), 3) - plain) < 1e-9
    assert largest(cut(asvd.decompose(W_ON, draw(shape[1]).abs(), alpha=0.0), 3) - plain) < 1e-9


@pytest.mark.parametrize("shape", SHAPES)
def test_fwsvd_weighted_error_is_the_tail_and_the_least_there_is(shape: tuple[int, int]):
    W_ON, fisher_N = draw(*shape), draw(shape[1], seed=2).square()
    decomposition, plain = fwsvd.decompose(W_ON, fisher_N), svd.decompose(W_ON)
    for rank in range(1, min(shape) + 1):
        weighted = float(((W_ON - cut(decomposition, rank)) * fisher_N.sqrt()).square().sum())
        assert math.sqrt(weighted) == pytest.approx(decomposition.loss(rank), abs=1e-9)
        assert weighted <= float(((W_ON - cut(plain, rank)) * fisher_N.sqrt()).square().sum()) + 1e-9
        unweighted = float((W_ON - cut(decomposition, rank)).square().sum())
        assert unweighted >= float((W_ON - cut(plain, rank)).square().sum()) - 1e-9
    assert largest(cut(decomposition, min(shape)) - W_ON) < 1e-5


def test_a_method_says_how_many_examples_are_squared_together():
    method = METHODS["fwsvd"]
    assert method.config().fisher_batch == 1, "the true empirical Fisher"
    assert method.gradients(method.config()) == {"fisher"}
    assert method.gradients(method.configured({"fisher_batch": 8})) == {"fisher:8"}
    for batch in (0, -1):
        with pytest.raises(ParedError, match=f"option fisher_batch: .* 1 or more, got {batch}"):
            method.configured({"fisher_batch": batch})
    W_ON, fisher_N = draw(6, 9), draw(9, seed=2).square()
    one = method.decompose(W_ON, {"fisher": fisher_N})
    many = method.decompose(W_ON, {"fisher:8": fisher_N}, {"fisher_batch": 8})
    assert torch.equal(cut(one, 3), cut(many, 3))


def test_scaling_the_importance_changes_nothing():
    W_ON, fisher_N = draw(6, 9), draw(9, seed=2).square()
    once, more = (cut(fwsvd.decompose(W_ON, c * fisher_N), 3) for c in (1.0, 1e6))
    assert largest(once - more) < 1e-9


def test_raising_one_features_importance_lowers_its_error_monotonically():
    W_ON, errors = draw(6, 9), []
    for boost in (1.0, 4.0, 16.0, 256.0):
        fisher_N = torch.ones(9, dtype=torch.float64)
        fisher_N[4] = boost
        errors.append(float((W_ON - cut(fwsvd.decompose(W_ON, fisher_N), 3))[:, 4].norm()))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.2 * errors[0]


def test_features_without_gradient_are_survived_and_bad_fisher_is_refused():
    W_ON, fisher_N = draw(9, 6), torch.tensor([0.0, 1.0, 2.0, 0.0, 1.0, 3.0])
    assert bool(cut(fwsvd.decompose(W_ON, fisher_N), 4).isfinite().all())
    assert largest(cut(fwsvd.decompose(W_ON, torch.zeros(6)), 3) - cut(svd.decompose(W_ON), 3)) < 1e-9
    for bad in (-1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="negative or not finite"):
            fwsvd.decompose(W_ON, torch.full((6,), bad))
        with pytest.raises(ValueError, match="negative or not finite"):
            asvd.decompose(W_ON, torch.full((6,), bad))


@pytest.mark.parametrize("shape", SHAPES)
def test_asvd_is_the_papers_form_with_an_exact_svd(shape: tuple[int, int]):
    W_ON, magnitude_N = draw(*shape), draw(shape[1], seed=3).abs()
    scale_N = magnitude_N**0.5 + 1e-6
    paper = truncated(W_ON * scale_N, 3) / scale_N
    decomposition = asvd.decompose(W_ON, magnitude_N)
    assert largest(cut(decomposition, 3) - paper) < 1e-8
    error = float(((W_ON - cut(decomposition, 3)) * scale_N).norm())
    assert error == pytest.approx(decomposition.loss(3), abs=1e-9)


def test_asvd_ignores_the_scale_of_all_activations():
    W_ON, magnitude_N = draw(6, 9), draw(9, seed=3).abs() + 0.1
    once, more = (cut(asvd.decompose(W_ON, c * magnitude_N), 3) for c in (1.0, 1e4))
    assert largest(once - more) < 1e-4


def test_asvd_keeps_a_loud_channel_better_than_the_plain_svd():
    W_ON, magnitude_N = draw(6, 9), torch.ones(9, dtype=torch.float64)
    magnitude_N[2] = 100
    ours, plain = cut(asvd.decompose(W_ON, magnitude_N), 3), cut(svd.decompose(W_ON), 3)
    assert (W_ON - ours)[:, 2].norm() < (W_ON - plain)[:, 2].norm()


def test_output_error_orders_svd_asvd_whitened():
    mix = draw(9, 9, seed=5)
    X_TN = draw(400, 9, seed=4) @ torch.diag(torch.logspace(-1, 1, 9, dtype=torch.float64)) @ (torch.eye(9) + 0.1 * mix)
    W_ON = draw(8, 9)
    errors = [
        float((X_TN @ (W_ON - cut(decomposition, 4)).T).norm())
        for decomposition in (
            svd.decompose(W_ON),
            asvd.decompose(W_ON, X_TN.abs().mean(0)),
            whitening.decompose(W_ON, X_TN.T @ X_TN),
        )
    ]
    assert errors == sorted(errors, reverse=True)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("form", ["full", "diagonal", "scalar"])
def test_the_expected_loss_is_the_tail(shape: tuple[int, int], form: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(loss_optimal, "DAMPING", 0.0)
    W_ON, A_NN, B_OO = draw(*shape), gram(shape[1]), gram(shape[0], seed=6)
    if form != "full":
        B_OO = B_OO.diagonal().diag() if form == "diagonal" else torch.eye(shape[0]).double() * 0.37
    given = {"full": B_OO, "diagonal": B_OO.diagonal(), "scalar": B_OO[0, 0]}[form]
    decomposition = loss_optimal.decompose(W_ON, A_NN, given)
    for rank in range(1, min(shape) + 1):
        D_ON = cut(decomposition, rank) - W_ON
        assert float(torch.trace(B_OO @ D_ON @ A_NN @ D_ON.T)) == pytest.approx(decomposition.loss(rank) ** 2, abs=1e-8)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_two_sided_optimum_is_that_of_the_formula(shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(loss_optimal, "DAMPING", 0.0)
    W_ON, A_NN, B_OO = draw(*shape), gram(shape[1]), gram(shape[0], seed=6)

    def root(G: torch.Tensor) -> torch.Tensor:
        e, Q = torch.linalg.eigh(G)
        return Q * e.sqrt() @ Q.T

    P, Q = root(A_NN), root(B_OO)
    formula = torch.linalg.inv(Q).T @ truncated(Q.T @ W_ON @ P, 3) @ torch.linalg.inv(P)
    assert largest(cut(loss_optimal.decompose(W_ON, A_NN, B_OO), 3) - formula) < 1e-8


@pytest.mark.parametrize("shape", SHAPES)
def test_no_output_weighting_is_svd_llm_and_none_at_all_the_svd(
    shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(loss_optimal, "DAMPING", 0.0)
    W_ON, A_NN = draw(*shape), gram(shape[1])
    for B in (torch.eye(shape[0]).double(), torch.ones(shape[0]), torch.tensor(5.0)):
        assert largest(cut(loss_optimal.decompose(W_ON, A_NN, B), 3) - cut(whitening.decompose(W_ON, A_NN), 3)) < 1e-8
    neither = loss_optimal.decompose(W_ON, torch.eye(shape[1]).double(), torch.eye(shape[0]).double())
    assert largest(cut(neither, 3) - cut(svd.decompose(W_ON), 3)) < 1e-8


def test_scaling_an_output_and_its_reader_leaves_the_losses_alone(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(loss_optimal, "DAMPING", 0.0)
    W_ON, A_NN, B_OO, c = draw(6, 9), gram(9), gram(6, seed=6), 3.0
    before = loss_optimal.decompose(W_ON, A_NN, B_OO).singular_values_R
    after = loss_optimal.decompose(c * W_ON, A_NN, B_OO / c**2).singular_values_R  # y grew, its gradient shrank
    assert torch.allclose(before, after, rtol=1e-9)
    louder = loss_optimal.decompose(W_ON, A_NN, c * B_OO).singular_values_R.square()
    assert torch.allclose(louder, c * before.square(), rtol=1e-9)


@pytest.mark.parametrize("shape", [(6, 9), (9, 6)])
@pytest.mark.parametrize("form", ["full", "diagonal", "scalar"])
def test_statistics_that_say_nothing_leave_svd_llms_or_a_plain_decomposition_at_no_cost(
    form: str, shape: tuple[int, int]
):
    """Regression: one site without gradient, as block expansion makes, ended the whole run."""
    W_ON, (out, width) = draw(*shape), shape
    nothing = {"full": torch.zeros(out, out), "diagonal": torch.zeros(out), "scalar": torch.zeros(())}[form]
    unfelt = loss_optimal.decompose(W_ON, gram(width), nothing)
    expected = loss_optimal.decompose(W_ON, gram(width), torch.ones(()))
    assert not bool(unfelt.singular_values_R.any())
    assert "no gradient" in unfelt.fallback
    assert not expected.fallback
    for found, other in ((unfelt, expected), (loss_optimal.decompose(W_ON, torch.zeros(width, width), torch.ones(out)),
                                              svd.decompose(W_ON))):  # fmt: skip
        assert not bool(found.singular_values_R.any())
        products = [one.factors(3).up @ one.factors(3).down for one in (found, other)]
        torch.testing.assert_close(*products, atol=1e-8, rtol=1e-8)


def test_a_member_without_gradient_does_not_end_its_group():
    weights, B_OO = [draw(6, 9), draw(6, 9)], gram(6)
    found = loss_optimal.decompose_group(weights, gram(9), [B_OO, torch.zeros(6, 6)])
    own = loss_optimal.decompose(weights[0], gram(9), B_OO)
    assert bool(found.factors(5).up.isfinite().all())
    assert not found.fallback
    assert float(found.singular_values_R[0]) == pytest.approx(float(own.singular_values_R[0]), rel=0.05)


def test_statistics_that_are_no_numbers_are_refused():
    with pytest.raises(ValueError, match="output gradient"):
        loss_optimal.decompose(draw(6, 9), gram(9), torch.full((6,), math.nan))
    with pytest.raises(ValueError, match="input Gram"):
        loss_optimal.decompose(draw(6, 9), torch.full((9, 9), math.nan), torch.ones(6))


@pytest.mark.parametrize("shape", [(192, 64), (64, 192)])
def test_a_gradient_gram_of_one_direction_and_rounding_is_damped_further(
    shape: tuple[int, int],
) -> None:
    """The head of a classifier: its Gram is indefinite by more than 1e-4 of the mean diagonal."""
    generator = torch.Generator().manual_seed(0)
    W_ON, X_TN = torch.randn(shape, generator=generator), torch.randn(500, shape[1], generator=generator)
    direction_O = torch.randn(shape[0], generator=generator).double()
    B_OO = torch.outer(direction_O, direction_O)
    B_OO -= 3e-6 * B_OO.trace() * torch.eye(shape[0])  # what rounding does, at its worst
    assert torch.linalg.eigvalsh(B_OO)[0] < -loss_optimal.DAMPING * B_OO.diagonal().mean()
    found = loss_optimal.decompose(W_ON, X_TN.T @ X_TN / 500, B_OO)
    assert found.damping in loss_optimal.MORE_DAMPING
    seen_N, kept_N = direction_O @ W_ON.double(), direction_O @ cut(found, 1).double()
    assert (seen_N - kept_N).norm() < 0.05 * seen_N.norm()  # the one direction that matters is kept
