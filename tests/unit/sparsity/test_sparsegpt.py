"""SparseGPT against what its updates are by definition, with inverses written out."""

import math
from collections.abc import Callable

import pytest
import torch

from pared import error_feedback
from pared.sparsity import METHODS, NM, Pattern, Unstructured, masks, sparsegpt

PATTERNS = pytest.mark.parametrize("pattern", [Unstructured(0.5), Unstructured(0.7), NM(2, 4), NM(4, 8)], ids=str)


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def inputs(features: int, tokens: int = 300, seed: int = 1) -> torch.Tensor:
    """Tokens made of directions of unequal strength, and features of unequal size, as activations are."""
    strengths = torch.logspace(0.5, -1, features, dtype=torch.float64)
    sizes = draw(features, seed=seed + 200).mul(0.7).exp()
    return draw(tokens, features, seed=seed) * strengths @ draw(features, features, seed=seed + 100) * sizes


def gram_of(X_TN: torch.Tensor) -> torch.Tensor:
    return X_TN.T @ X_TN


def damped(gram_NN: torch.Tensor, damping: float = 0.01) -> torch.Tensor:
    return gram_NN + damping * gram_NN.diagonal().mean() * torch.eye(len(gram_NN), dtype=gram_NN.dtype)


def some_mask(*shape: int, seed: int = 7) -> torch.Tensor:
    return draw(*shape, seed=seed) > 0


def output_error(X_TN: torch.Tensor, W_ON: torch.Tensor, pruned_ON: torch.Tensor) -> float:
    return float(torch.linalg.matrix_norm(X_TN @ (W_ON - pruned_ON).T))


def largest(difference: torch.Tensor) -> float:
    return float(difference.abs().max())


def by_inverses(
    W_ON: torch.Tensor, H_NN: torch.Tensor, choose: Callable[[torch.Tensor, int], torch.Tensor], every: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Optimal brain surgeon from the first input to the last, the inverse of what is left taken anew each time.

    ``choose`` gets the scores ``w² / [H⁻¹]_jj`` of the next inputs, with the inverse over j and all that follow.
    """
    W_ON, mask_ON = W_ON.clone(), torch.ones_like(W_ON, dtype=torch.bool)
    inverses = [torch.linalg.inv(H_NN[j:, j:]) for j in range(len(H_NN))]
    first = torch.stack([inverse[0, 0] for inverse in inverses])
    for j, inverse in enumerate(inverses):
        if j % every == 0:
            chosen = slice(j, j + every)
            mask_ON[:, chosen] = choose(W_ON[:, chosen].square() / first[chosen], j)
        gone_O = ~mask_ON[:, j]
        W_ON[gone_O, j:] -= W_ON[gone_O, j, None] / inverse[0, 0] * inverse[0]
    return W_ON * mask_ON, mask_ON


def test_u_is_the_upper_cholesky_factor_of_the_inverse():
    gram_NN = gram_of(inputs(30))
    for damping in (0.0, 0.01, 0.3):
        U_NN = error_feedback.inverse_factor(gram_NN, damping)
        inverse_NN = torch.linalg.inv(damped(gram_NN, damping))
        assert torch.equal(U_NN, U_NN.triu())
        assert largest(U_NN.T @ U_NN - inverse_NN) < 1e-9 * largest(inverse_NN)
        papers = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(damped(gram_NN, damping)))).T
        assert largest(U_NN - papers) < 1e-9 * largest(papers)


@pytest.mark.parametrize("weight", [0, 1, 11, 23])
def test_one_weight_is_made_up_for_by_the_closed_form(weight: int):
    """``δ = -w_p / [H⁻¹]_pp · H⁻¹_:,p`` over all inputs, p put first so that all others follow it."""
    order = [weight, *(j for j in range(24) if j != weight)]
    W_ON, X_TN = draw(3, 24)[:, order], inputs(24)[:, order]
    inverse_NN = torch.linalg.inv(damped(gram_of(X_TN)))
    mask_ON = torch.ones(3, 24, dtype=torch.bool)
    mask_ON[1, 0] = False
    expected = W_ON.clone()
    expected[1] -= W_ON[1, 0] / inverse_NN[0, 0] * inverse_NN[:, 0]
    expected[1, 0] = 0
    updated = sparsegpt.update(W_ON, gram_of(X_TN), mask_ON)
    assert largest(updated.weight - expected) < 1e-10
    assert largest(updated.weight[1] - W_ON[1]) > 1e-2
    assert torch.equal(updated.weight[[0, 2]], W_ON[[0, 2]])
    assert updated.weight[1, 0] == 0
    assert torch.equal(updated.mask, mask_ON)


@pytest.mark.parametrize("block", [1, 5, 20, 128])
def test_a_given_mask_is_made_up_for_as_by_inverses(block: int):
    W_ON, H_NN, mask_ON = draw(6, 20), damped(gram_of(inputs(20))), some_mask(6, 20)
    expected, _ = by_inverses(W_ON, H_NN, lambda _, j: mask_ON[:, j : j + 1], every=1)
    ours = sparsegpt.update(W_ON, gram_of(inputs(20)), mask_ON, block=block)
    assert largest(ours.weight - expected) < 1e-9
    assert torch.equal(ours.weight != 0, mask_ON)


@pytest.mark.parametrize("block", [5, 8, 12, 24, 128])
@pytest.mark.parametrize("sparsity", [0.3, 0.5, 0.8])
def test_blocks_are_chosen_from_weights_as_they_are_by_then(block: int, sparsity: float):
    W_ON, gram_NN, pattern = draw(6, 24), gram_of(inputs(24)), Unstructured(sparsity)
    expected, mask_ON = by_inverses(W_ON, damped(gram_NN), lambda scores, _: masks.per_matrix(scores, pattern), block)
    ours = sparsegpt.prune(W_ON, gram_NN, pattern, block=block)
    assert torch.equal(ours.mask, mask_ON)
    assert largest(ours.weight - expected) < 1e-9
    for start in range(0, 24, block):
        of_block = ours.weight[:, start : start + block]
        assert int((of_block == 0).sum()) == math.floor(of_block.numel() * sparsity + 1e-9)


@pytest.mark.parametrize(("pattern", "block"), [(NM(2, 4), 128), (NM(2, 4), 4), (NM(2, 4), 8), (NM(1, 3), 12)])
def test_groups_are_chosen_from_weights_as_they_are_by_then(pattern: NM, block: int):
    W_ON, gram_NN = draw(6, 24), gram_of(inputs(24))
    expected, mask_ON = by_inverses(
        W_ON, damped(gram_NN), lambda scores, _: masks.per_group(scores, pattern), pattern.group
    )
    ours = sparsegpt.prune(W_ON, gram_NN, pattern, block=block * pattern.group // math.gcd(block, pattern.group))
    assert torch.equal(ours.mask, mask_ON)
    assert largest(ours.weight - expected) < 1e-9
    kept = (ours.weight != 0).view(6, -1, pattern.group).sum(dim=2)
    assert bool((kept == pattern.kept).all())
    U_N = error_feedback.inverse_factor(gram_NN).diagonal()
    assert not torch.equal(ours.mask, masks.per_group(W_ON.abs() / U_N, pattern))  # not from the weights of before


@pytest.mark.parametrize(("compute", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-4)])
def test_the_block_changes_nothing_once_the_mask_is_given(compute: torch.dtype, tolerance: float):
    W_ON, gram_NN, mask_ON = draw(8, 160), gram_of(inputs(160, tokens=500)), some_mask(8, 160)
    exact = sparsegpt.update(W_ON, gram_NN, mask_ON, block=1).weight
    assert largest(exact - W_ON * mask_ON) > 0.1
    for block in (1, 7, 128, 160):
        ours = sparsegpt.update(W_ON, gram_NN, mask_ON, block=block, compute=compute).weight
        assert largest(ours - exact) < tolerance * largest(exact)


def test_a_given_mask_is_the_pruned_result_again():
    W_ON, gram_NN = draw(6, 40), gram_of(inputs(40))
    for pattern in (Unstructured(0.5), NM(2, 4)):
        pruned = sparsegpt.prune(W_ON, gram_NN, pattern, block=8)
        assert largest(sparsegpt.update(W_ON, gram_NN, pruned.mask).weight - pruned.weight) < 1e-10


def test_independent_inputs_leave_weighted_magnitude_and_no_update():
    W_ON, energy_N = draw(8, 24), draw(24, seed=4).exp()
    for pattern, keep in ((Unstructured(0.5), masks.per_matrix), (NM(2, 4), masks.per_group)):
        pruned = sparsegpt.prune(W_ON, energy_N.diag(), pattern, damping=0.0)
        assert torch.equal(pruned.mask, keep(W_ON.square() * energy_N, pattern))
        assert torch.equal(pruned.weight, W_ON * pruned.mask)


@PATTERNS
def test_output_error_falls_from_magnitude_to_wanda_to_sparsegpt(pattern: Pattern):
    for seed in range(8):
        W_ON, X_TN = draw(48, 64, seed=seed), inputs(64, tokens=400, seed=seed + 50)
        statistics = {"energy": X_TN.square().sum(dim=0), "gram": gram_of(X_TN)}
        by_magnitude, by_wanda, by_sparsegpt = (
            output_error(X_TN, W_ON, METHODS[name].prune(W_ON, pattern, statistics).weight)
            for name in ("magnitude", "wanda", "sparsegpt")
        )
        assert by_sparsegpt < by_wanda < by_magnitude


def test_no_update_of_the_last_inputs_has_less_error():
    """With the mask all in the first half, the second half is the least-squares fit to what was lost."""
    W_ON, gram_NN = draw(5, 20), gram_of(inputs(20))
    mask_ON = torch.ones(5, 20, dtype=torch.bool)
    mask_ON[:, :10] = False
    H_NN = damped(gram_NN)
    fit_ON = W_ON[:, 10:] + W_ON[:, :10] @ H_NN[:10, 10:] @ torch.linalg.inv(H_NN[10:, 10:])
    assert largest(sparsegpt.update(W_ON, gram_NN, mask_ON).weight[:, 10:] - fit_ON) < 1e-9


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("pattern", [Unstructured(0), NM(4, 4)], ids=str)
def test_nothing_pruned_leaves_every_bit(pattern: Pattern, dtype: torch.dtype):
    W_ON = draw(8, 16).to(dtype)
    W_ON[:, 3] = -0.0
    pruned = sparsegpt.prune(W_ON, gram_of(inputs(16)), pattern)
    assert torch.equal(pruned.weight.view(torch.int16), W_ON.view(torch.int16))
    assert bool(pruned.mask.all())


@PATTERNS
def test_pruning_twice_changes_nothing(pattern: Pattern):
    gram_NN = gram_of(inputs(40))
    once = sparsegpt.prune(draw(8, 40).float(), gram_NN, pattern, block=16)
    again = sparsegpt.prune(once.weight, gram_NN, pattern, block=16)
    assert torch.equal(again.weight, once.weight)
    assert torch.equal(again.mask, once.mask)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_result_has_the_dtype_of_the_weight_and_zeros_are_zero(dtype: torch.dtype):
    W_ON, gram_NN = draw(8, 40).to(dtype), gram_of(inputs(40))
    before = W_ON.clone()
    pruned = sparsegpt.prune(W_ON, gram_NN, Unstructured(0.5))
    exact = sparsegpt.prune(W_ON.double(), gram_NN, Unstructured(0.5))
    assert pruned.weight.dtype == dtype
    assert torch.equal(pruned.weight, exact.weight.to(dtype))
    assert int((pruned.weight == 0).sum()) == int((~pruned.mask).sum()) == 160
    assert not bool(torch.signbit(pruned.weight[~pruned.mask]).any())
    assert torch.equal(W_ON, before)  # what was given is not written to


@PATTERNS
@pytest.mark.parametrize("compute", [torch.float32, torch.float64])
@pytest.mark.parametrize(("of_weight", "of_gram"), [(1e-30, 1e-30), (1e30, 1e30), (1, 1e-30), (1e-30, 1e30)])
def test_scales_do_not_matter(pattern: Pattern, compute: torch.dtype, of_weight: float, of_gram: float):
    X_TN = inputs(40)
    X_TN[:, [0, 9]] = 0  # where the paper's code puts a 1, whatever the scale of the others
    W_ON, gram_NN = draw(8, 40).float(), gram_of(X_TN).float()
    expected = sparsegpt.prune(W_ON, gram_NN, pattern, compute=compute)
    scaled = sparsegpt.prune(W_ON * of_weight, gram_NN * of_gram, pattern, compute=compute)
    assert torch.equal(scaled.mask, expected.mask)
    assert largest(scaled.weight.double() / of_weight - expected.weight) < 1e-4 * largest(expected.weight)


@pytest.mark.parametrize("scale", [1.0, 1e-8, 1e8])
def test_dead_inputs_become_zero_and_change_nothing_else(scale: float):
    X_TN, W_ON, mask_ON = inputs(24), draw(6, 24), some_mask(6, 24)
    dead = [0, 7, 23]
    alive = [j for j in range(24) if j not in dead]
    X_TN[:, dead] = 0
    updated = sparsegpt.update(W_ON, scale * gram_of(X_TN), mask_ON)
    alone = sparsegpt.update(W_ON[:, alive], gram_of(X_TN[:, alive]), mask_ON[:, alive])
    assert not bool(updated.weight[:, dead].any())
    assert largest(updated.weight[:, alive] - alone.weight) < 1e-10
    for pattern in (Unstructured(0.5), NM(2, 4)):
        pruned = sparsegpt.prune(W_ON, gram_of(X_TN), pattern)
        assert bool(pruned.weight.isfinite().all())
        assert not bool(pruned.weight[:, dead].any())
        assert int((~pruned.mask).sum()) == 72
        assert not bool(pruned.mask[:, dead].any())  # they are the first to go


def test_dead_inputs_become_zero_where_nothing_is_pruned():
    X_TN, W_ON = inputs(8), draw(4, 8)
    X_TN[:, 2] = 0
    pruned = sparsegpt.prune(W_ON, gram_of(X_TN), Unstructured(0))
    expected = W_ON.clone()
    expected[:, 2] = 0
    assert torch.equal(pruned.weight, expected)


def test_a_gram_of_zeros_leaves_the_weight_to_itself(caplog: pytest.LogCaptureFixture):
    W_ON = draw(4, 8)
    with caplog.at_level("INFO", logger="pared"):
        pruned = sparsegpt.prune(W_ON, torch.zeros(8, 8), Unstructured(0.5))
    assert torch.equal(pruned.weight, METHODS["magnitude"].prune(W_ON, Unstructured(0.5), {}).weight)
    assert "is zero: pruned by the weight alone" in caplog.text


@PATTERNS
@pytest.mark.parametrize("tokens", [1, 5, 39])
def test_fewer_tokens_than_inputs_are_survived(pattern: Pattern, tokens: int, caplog: pytest.LogCaptureFixture):
    X_TN, W_ON = inputs(40, tokens), draw(8, 40)
    with caplog.at_level("INFO", logger="pared"):
        pruned = sparsegpt.prune(W_ON, gram_of(X_TN), pattern)
    assert "rank-deficient" not in caplog.text  # the paper's damping is enough
    assert bool(pruned.weight.isfinite().all())
    unmade = output_error(X_TN, W_ON, W_ON * pruned.mask)
    assert output_error(X_TN, W_ON, pruned.weight) < unmade


@pytest.mark.parametrize("damping", [0.0, 1e-16])
def test_too_little_damping_is_raised_and_said(damping: float, caplog: pytest.LogCaptureFixture):
    gram_NN, W_ON = gram_of(inputs(40, tokens=10)), draw(8, 40)
    with caplog.at_level("INFO", logger="pared"):
        pruned = sparsegpt.prune(W_ON, gram_NN, Unstructured(0.5), damping=damping)
    assert "Gram of 40 features is rank-deficient: relative damping 1e-08" in caplog.text
    assert torch.equal(pruned.weight, sparsegpt.prune(W_ON, gram_NN, Unstructured(0.5), damping=1e-8).weight)


def test_duplicate_inputs_are_full_rank_by_rounding_alone_and_are_damped(caplog: pytest.LogCaptureFixture):
    gram_NN = torch.diag(torch.tensor([1.0] * 7 + [1e-16], dtype=torch.float64))
    assert int(torch.linalg.cholesky_ex(gram_NN).info) == 0  # the trap: Cholesky itself sees nothing wrong
    with caplog.at_level("INFO", logger="pared"):
        U_NN = error_feedback.inverse_factor(gram_NN, damping=0.0)
    assert largest(U_NN) < 1e5
    assert "rank-deficient" in caplog.text


INDEFINITE = torch.eye(8) - 3 * torch.ones(8, 8).triu(1) - 3 * torch.ones(8, 8).tril(-1)
DEAD_WITH_PRODUCTS = torch.eye(8) + 0.01
DEAD_WITH_PRODUCTS[3, 3] = 0


@pytest.mark.parametrize(
    ("gram", "told"),
    [
        (torch.full((8, 8), math.nan), "NaN or infinity"),
        (torch.eye(8) * math.inf, "NaN or infinity"),
        (-torch.eye(8), "not positive semi-definite: its diagonal has negative"),
        (INDEFINITE, "not positive semi-definite, even with damping 1"),
        (DEAD_WITH_PRODUCTS, "not positive semi-definite: an input without energy"),
        (torch.eye(7), r"Gram of shape \(7, 7\) for a weight \(4, 8\): expected \(in, in\)"),
        (torch.ones(8), r"Gram of shape \(8,\) for a weight \(4, 8\): expected \(in, in\)"),
    ],
    ids=["nan", "infinite", "negative", "indefinite", "dead with products", "narrow", "diagonal"],
)
def test_gram_that_cannot_be_one_is_a_value_error(gram: torch.Tensor, told: str):
    with pytest.raises(ValueError, match=told):
        sparsegpt.prune(draw(4, 8), gram, Unstructured(0.5))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_weights_that_are_not_finite_are_refused(bad: float):
    W_ON = draw(4, 8)
    W_ON[2, 1] = bad
    with pytest.raises(ValueError, match="the weight holds NaN or infinity"):
        sparsegpt.prune(W_ON, torch.eye(8), Unstructured(0.5))


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"block": 0}, "blocks of 0 inputs"),
        ({"block": -128}, "blocks of -128 inputs"),
        ({"damping": -0.01}, "damping -0.01: expected a fraction"),
        ({"damping": math.nan}, "damping nan: expected a fraction"),
        ({"damping": math.inf}, "damping inf: expected a fraction"),
        ({"compute": torch.bfloat16}, "expected float32 or float64"),
    ],
)
def test_options_out_of_range_are_named(options: dict[str, object], told: str):
    for pattern in (Unstructured(0.5), NM(2, 4)):
        with pytest.raises(ValueError, match=told):
            sparsegpt.prune(draw(4, 8), torch.eye(8), pattern, **options)


def test_a_block_that_cuts_groups_is_refused():
    with pytest.raises(ValueError, match="pattern 2:4 in blocks of 6 inputs: expected a multiple of 4"):
        sparsegpt.prune(draw(4, 8), torch.eye(8), NM(2, 4), block=6)


@pytest.mark.parametrize("mask", [torch.ones(4, 8), torch.ones(8, 4, dtype=torch.bool), torch.ones(8).bool()])
def test_a_mask_that_is_none_is_refused(mask: torch.Tensor):
    with pytest.raises(ValueError, match=r"for a weight \(4, 8\): expected booleans of its shape"):
        sparsegpt.update(draw(4, 8), torch.eye(8), mask)


def test_an_update_that_overflows_is_an_error_and_not_infinity():
    W_ON = torch.full((1, 2), 60000.0, dtype=torch.float16)
    gram_NN, mask_ON = torch.tensor([[1.0, 0.999], [0.999, 1.0]]), torch.tensor([[False, True]])
    with pytest.raises(ValueError, match=r"leaves the range of torch\.float16"):
        sparsegpt.update(W_ON, gram_NN, mask_ON)
    assert 1e5 < float(sparsegpt.update(W_ON.float(), gram_NN, mask_ON).weight[0, 1]) < 1.2e5
