"""The identities of whitened SVD: every paper form is the same map, and its error is the tail of the spectrum."""

import math

import pytest
import torch

from pared.calibration import Gram
from pared.lowrank import METHODS, Decomposition, svd, whitening
from pared.lowrank.decomposition import from_output_gram, from_root
from pared.schema.plan import rank_for

# out < in goes through the Gram of the outputs, out > in through the root of the Gram.
SHAPES = pytest.mark.parametrize("shape", [(24, 40), (40, 24), (32, 32)], ids=["wide", "tall", "square"])


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def inputs(features: int, tokens: int = 200, seed: int = 1) -> torch.Tensor:
    """Tokens whose features are correlated and of unequal size, as activations are."""
    mixing = draw(features, features, seed=seed + 100) * torch.logspace(0.5, -0.5, features, dtype=torch.float64)
    return draw(tokens, features, seed=seed) @ mixing


def example(shape: tuple[int, int], tokens: int = 200) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    X_TN = inputs(shape[1], tokens)
    return draw(*shape), X_TN, X_TN.T @ X_TN


def cut(decomposition: Decomposition, rank: int) -> torch.Tensor:
    down, up = decomposition.factors(rank)
    return up @ down


def outputs_of(X_TN: torch.Tensor, W_ON: torch.Tensor) -> torch.Tensor:
    """The Gram of the outputs, from outputs."""
    Y_TO = X_TN @ W_ON.T
    return Y_TO.T @ Y_TO


def output_error(X_TN: torch.Tensor, W_ON: torch.Tensor, approximation_ON: torch.Tensor) -> float:
    return float(torch.linalg.matrix_norm(X_TN @ (W_ON - approximation_ON).T))


def largest(difference: torch.Tensor) -> float:
    return float(difference.abs().max())


# The papers' own forms, written out.


def svd_llm(W_ON: torch.Tensor, G_NN: torch.Tensor, rank: int) -> torch.Tensor:
    """SVD-LLM: ``L Lᵀ = G``, ``W L = U Σ Vᵀ``, ``W' = U_k Σ_k V_kᵀ L⁻¹``."""
    L_NN = torch.linalg.cholesky(G_NN)
    U, s, Vh = torch.linalg.svd(W_ON @ L_NN, full_matrices=False)
    up = U[:, :rank] * s[:rank].sqrt()
    down = s[:rank, None].sqrt() * Vh[:rank] @ torch.linalg.inv(L_NN)
    return up @ down


def svd_llm_v2(W_ON: torch.Tensor, G_NN: torch.Tensor, rank: int) -> torch.Tensor:
    """SVD-LLM V2: ``G = Q e Qᵀ``, ``W Q √e = U Σ Vᵀ``, ``W' = U_k Σ_k V_kᵀ e^-½ Qᵀ``; pseudo-inverse if deficient."""
    e, Q = torch.linalg.eigh(G_NN)
    used = e > 1e-12 * e[-1]
    root = torch.where(used, e, 0).sqrt()
    inverse_root = torch.where(used, 1 / root, 0)
    U, s, Vh = torch.linalg.svd(W_ON @ Q * root, full_matrices=False)
    return U[:, :rank] * s[:rank] @ Vh[:rank] * inverse_root @ Q.T


def swift_svd(W_ON: torch.Tensor, X_TN: torch.Tensor, rank: int) -> torch.Tensor:
    """Swift-SVD: ``C = Yᵀ Y`` of the outputs, ``C = V e Vᵀ``, ``W' = V_k V_kᵀ W``."""
    _, V = torch.linalg.eigh(outputs_of(X_TN, W_ON))
    V_k = V.flip(1)[:, :rank]
    return V_k @ (V_k.T @ W_ON)


def basis_sharing_of_one(W_ON: torch.Tensor, G_NN: torch.Tensor, rank: int) -> torch.Tensor:
    """Basis Sharing, n = 1, ``(in, out)``: ``Sᵀ S = G``, ``S W = U Σ Vᵀ``, ``B = S⁻¹ U_k Σ_k``, ``C = V_kᵀ``."""
    S_NN = torch.linalg.cholesky(G_NN).T
    U, s, Vh = torch.linalg.svd(S_NN @ W_ON.T, full_matrices=False)
    return (torch.linalg.inv(S_NN) @ (U[:, :rank] * s[:rank]) @ Vh[:rank]).T


def test_cholesky_whitens_the_gram():
    _, _, G_NN = example((24, 40))
    L_NN, _, damping = whitening.cholesky_factor(G_NN)
    L_inv = torch.linalg.inv(L_NN)
    assert damping == 0
    assert largest(L_inv @ G_NN @ L_inv.T - torch.eye(40)) < 1e-8
    assert torch.equal(L_NN, L_NN.tril())


@SHAPES
@pytest.mark.parametrize("rank", [1, 7, 16, 23])
def test_every_paper_form_is_the_same_map(shape: tuple[int, int], rank: int):
    W_ON, X_TN, G_NN = example(shape)
    ours = cut(whitening.decompose(W_ON, G_NN), rank)
    assert largest(ours - svd_llm(W_ON, G_NN, rank)) < 1e-8
    assert largest(ours - svd_llm_v2(W_ON, G_NN, rank)) < 1e-8
    assert largest(ours - swift_svd(W_ON, X_TN, rank)) < 1e-8
    assert largest(ours - basis_sharing_of_one(W_ON, G_NN, rank)) < 1e-8
    assert largest(ours - W_ON) > 1e-2  # the forms agree on an approximation, not on the weight itself


@SHAPES
def test_directions_are_the_eigenvectors_of_the_output_gram(shape: tuple[int, int]):
    W_ON, X_TN, G_NN = example(shape)
    decomposition = whitening.decompose(W_ON, G_NN)
    C_OO = outputs_of(X_TN, W_ON)
    assert largest(C_OO - W_ON @ G_NN @ W_ON.T) < 1e-10 * largest(C_OO)
    s_R = decomposition.singular_values_R
    U_OR = decomposition.factors(len(s_R)).up
    assert largest(C_OO @ U_OR - U_OR * s_R.square()) < 1e-10 * largest(C_OO)
    assert torch.equal(s_R, s_R.sort(descending=True).values)


@SHAPES
def test_both_code_paths_give_the_same_decomposition(shape: tuple[int, int]):
    W_ON, _, G_NN = example(shape)
    by_outputs = from_output_gram(W_ON, W_ON @ G_NN @ W_ON.T)
    by_root = from_root(W_ON, torch.linalg.cholesky(G_NN))
    assert largest(cut(by_outputs, 9) - cut(by_root, 9)) < 1e-8
    assert by_outputs.loss(9) == pytest.approx(by_root.loss(9), rel=1e-8)


@SHAPES
def test_losses_alone_are_those_of_the_decomposition(shape: tuple[int, int]):
    W_ON, X_TN, G_NN = example(shape)
    for whole, losses in (
        (whitening.decompose(W_ON, G_NN), whitening.decompose_group([W_ON], G_NN, losses_only=True)),
        (
            whitening.decompose_by_outputs(W_ON, outputs_of(X_TN, W_ON)),
            whitening.decompose_by_outputs(W_ON, outputs_of(X_TN, W_ON), losses_only=True),
        ),
    ):
        assert whole.directed
        assert not losses.directed
        assert [losses.loss(rank) for rank in range(20)] == pytest.approx([whole.loss(rank) for rank in range(20)])


@SHAPES
def test_output_error_is_the_tail_of_the_singular_values(shape: tuple[int, int]):
    W_ON, X_TN, G_NN = example(shape)
    decomposition = whitening.decompose(W_ON, G_NN)
    s = torch.linalg.svdvals(W_ON @ torch.linalg.cholesky(G_NN))
    for rank in range(1, min(shape)):
        error = output_error(X_TN, W_ON, cut(decomposition, rank))
        assert error == pytest.approx(decomposition.loss(rank), rel=1e-5)
        assert error == pytest.approx(float(s[rank:].square().sum().sqrt()), rel=1e-5)


@SHAPES
def test_dropping_one_more_direction_costs_its_singular_value(shape: tuple[int, int]):
    W_ON, _, G_NN = example(shape)
    decomposition = whitening.decompose(W_ON, G_NN)
    for rank in (1, 5, 12):
        gained = decomposition.loss(rank - 1) ** 2 - decomposition.loss(rank) ** 2
        assert math.sqrt(gained) == pytest.approx(float(decomposition.singular_values_R[rank - 1]), rel=1e-8)


@SHAPES
def test_error_never_grows_with_the_rank(shape: tuple[int, int]):
    W_ON, X_TN, G_NN = example(shape)
    decomposition = whitening.decompose(W_ON, G_NN)
    errors = [output_error(X_TN, W_ON, cut(decomposition, rank)) for rank in range(1, min(shape) + 1)]
    losses = [decomposition.loss(rank) for rank in range(min(shape) + 1)]
    assert errors == sorted(errors, reverse=True)
    assert losses == sorted(losses, reverse=True)


@SHAPES
def test_full_rank_reproduces_the_weight(shape: tuple[int, int]):
    W_ON, _, G_NN = example(shape)
    for decomposition in (whitening.decompose(W_ON, G_NN), svd.decompose(W_ON)):
        assert largest(cut(decomposition, min(shape)) - W_ON) < 1e-8


@SHAPES
def test_loss_of_keeping_every_direction_is_zero(shape: tuple[int, int]):
    W_ON, _, G_NN = example(shape)
    assert whitening.decompose(W_ON, G_NN).loss(min(shape)) == 0
    assert svd.decompose(W_ON).loss(min(shape)) == 0


@SHAPES
def test_whitening_beats_plain_svd_on_the_outputs_and_loses_on_the_weight(shape: tuple[int, int]):
    W_ON, X_TN, G_NN = example(shape)
    whitened, plain = cut(whitening.decompose(W_ON, G_NN), 8), cut(svd.decompose(W_ON), 8)
    assert output_error(X_TN, W_ON, whitened) < output_error(X_TN, W_ON, plain)
    assert torch.linalg.matrix_norm(W_ON - plain) < torch.linalg.matrix_norm(W_ON - whitened)


@SHAPES
def test_no_perturbation_of_the_factors_lowers_the_output_error(shape: tuple[int, int]):
    W_ON, X_TN, G_NN = example(shape)
    decomposition = whitening.decompose(W_ON, G_NN)
    down, up = decomposition.factors(6)
    best = output_error(X_TN, W_ON, up @ down)
    for seed in range(20):
        step = 10.0 ** -(seed % 5)
        moved = (up + step * draw(*up.shape, seed=seed)) @ (down + step * draw(*down.shape, seed=seed + 50))
        assert output_error(X_TN, W_ON, moved) > best


@SHAPES
@pytest.mark.parametrize("scale", [1e-6, 1.0, 3e7])
def test_identity_gram_of_any_scale_reduces_to_plain_svd(shape: tuple[int, int], scale: float):
    W_ON = draw(*shape)
    whitened = whitening.decompose(W_ON, scale * torch.eye(shape[1]))
    U, s, Vh = torch.linalg.svd(W_ON, full_matrices=False)
    assert largest(cut(whitened, 9) - U[:, :9] * s[:9] @ Vh[:9]) < 1e-8
    assert largest(cut(svd.decompose(W_ON), 9) - U[:, :9] * s[:9] @ Vh[:9]) < 1e-8
    assert whitened.loss(9) == pytest.approx(math.sqrt(scale) * svd.decompose(W_ON).loss(9), rel=1e-8)


@SHAPES
def test_diagonal_gram_scales_the_columns_by_the_root_mean_square(shape: tuple[int, int]):
    W_ON = draw(*shape)
    mean_square_N = torch.linspace(0.1, 5, shape[1], dtype=torch.float64)
    scaled = W_ON * mean_square_N.sqrt()
    U, s, Vh = torch.linalg.svd(scaled, full_matrices=False)
    expected = U[:, :8] * s[:8] @ Vh[:8] / mean_square_N.sqrt()
    assert largest(cut(whitening.decompose(W_ON, mean_square_N.diag()), 8) - expected) < 1e-8


@SHAPES
def test_the_scale_of_the_gram_does_not_matter(shape: tuple[int, int]):
    W_ON, _, G_NN = example(shape)
    expected = cut(whitening.decompose(W_ON, G_NN), 8)
    for scale in (1e-9, 1e9):
        assert largest(cut(whitening.decompose(W_ON, scale * G_NN), 8) - expected) < 1e-8


@SHAPES
def test_applying_a_cut_twice_changes_nothing(shape: tuple[int, int]):
    W_ON, _, G_NN = example(shape)
    once = cut(whitening.decompose(W_ON, G_NN), 7)
    assert largest(cut(whitening.decompose(once, G_NN), 7) - once) < 1e-8
    up = whitening.decompose(W_ON, G_NN).factors(7).up
    assert largest(up @ (up.T @ once) - once) < 1e-10


@SHAPES
def test_factors_have_the_shapes_of_the_rank_and_orthonormal_ups(shape: tuple[int, int]):
    W_ON, _, G_NN = example(shape)
    for rank in (1, 7, min(shape)):
        down, up = whitening.decompose(W_ON, G_NN).factors(rank)
        assert down.shape == (rank, shape[1])
        assert up.shape == (shape[0], rank)
        assert largest(up.T @ up - torch.eye(rank)) < 1e-10
        assert torch.linalg.matrix_rank(up @ down) == rank


def test_every_rank_comes_from_one_eigendecomposition(monkeypatch: pytest.MonkeyPatch):
    solved = []
    for solver in ("eigh", "svd", "eigvalsh", "svdvals"):
        real = getattr(torch.linalg, solver)
        monkeypatch.setattr(torch.linalg, solver, lambda *a, r=real, **k: (solved.append(a[0].shape), r(*a, **k))[1])
    for shape in ((24, 40), (40, 24)):
        W_ON, _, G_NN = example(shape)
        solved.clear()
        decomposition = whitening.decompose(W_ON, G_NN)
        for rank in (4, 9, 20):
            decomposition.factors(rank)
            decomposition.loss(rank)
        assert solved == [(24, 24)]  # and of the smaller side


@SHAPES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_of_any_dtype_are_decomposed_in_float64(shape: tuple[int, int], dtype: torch.dtype):
    W_ON, _, G_NN = example(shape)
    low = W_ON.to(dtype)
    for ours, exact in (
        (whitening.decompose(low, G_NN.float()), whitening.decompose(low.double(), G_NN.float().double())),
        (svd.decompose(low), svd.decompose(low.double())),
    ):
        assert ours.factors(5).up.dtype == torch.float64
        assert torch.equal(cut(ours, 5), cut(exact, 5))


@pytest.mark.parametrize("tokens", [1, 6, 20, 31])
@pytest.mark.parametrize("shape", [(24, 32), (48, 32), (32, 32)], ids=["wide", "tall", "square"])
def test_rank_deficient_gram_gives_finite_factors(
    shape: tuple[int, int], tokens: int, caplog: pytest.LogCaptureFixture
):
    W_ON, X_TN, G_NN = example(shape, tokens)
    with caplog.at_level("INFO", logger="pared"):
        decomposition = whitening.decompose(W_ON, G_NN)
    assert 0 < decomposition.damping <= 1e-6
    assert "rank-deficient" in caplog.text
    whole = float(torch.linalg.matrix_norm(X_TN @ W_ON.T))
    for rank in (1, 4, 12, 24):
        down, up = decomposition.factors(rank)
        assert bool(down.isfinite().all() and up.isfinite().all())
        assert largest(up.T @ up - torch.eye(rank)) < 1e-8
        optimum = output_error(X_TN, W_ON, svd_llm_v2(W_ON, G_NN, rank))
        ours = output_error(X_TN, W_ON, up @ down)
        # From the rank of the data on, the optimum is 0 and only rounding is left, relative to the outputs themselves.
        assert ours <= optimum * (1 + 1e-6) + 1e-6 * whole * (rank >= tokens)


@pytest.mark.parametrize("shape", [(5, 8), (12, 8)], ids=["wide", "tall"])
def test_gram_of_full_rank_by_rounding_alone_is_damped(shape: tuple[int, int]):
    G_NN = torch.diag(torch.tensor([1.0] * 7 + [1e-16], dtype=torch.float64))
    assert int(torch.linalg.cholesky_ex(G_NN).info) == 0  # the trap: Cholesky itself sees nothing wrong
    assert whitening.decompose(draw(*shape), G_NN).damping > 0


def test_full_rank_gram_is_not_damped():
    W_ON, _, G_NN = example((24, 40))
    assert whitening.decompose(W_ON, G_NN).damping == 0


@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_damping_is_relative_to_the_scale_of_the_gram(scale: float):
    W_ON, X_TN, G_NN = example((24, 32), tokens=10)
    C_OO = outputs_of(X_TN, W_ON)
    for ours, scaled in (
        (whitening.decompose(W_ON, G_NN), whitening.decompose(W_ON, scale * G_NN)),
        (whitening.decompose_by_outputs(W_ON, C_OO), whitening.decompose_by_outputs(W_ON, scale * C_OO)),
    ):
        assert scaled.damping == ours.damping > 0
        assert scaled.loss(16) == pytest.approx(math.sqrt(scale) * ours.loss(16), rel=1e-4)


def test_loss_of_a_rank_deficient_gram_is_never_understated():
    W_ON, X_TN, G_NN = example((24, 32), tokens=20)
    decomposition = whitening.decompose(W_ON, G_NN)
    for rank in (1, 8, 16):
        error = output_error(X_TN, W_ON, cut(decomposition, rank))
        assert error <= decomposition.loss(rank) * (1 + 1e-9)
        assert decomposition.loss(rank) == pytest.approx(error, rel=1e-5)


@SHAPES
def test_features_that_are_always_zero_are_survived(shape: tuple[int, int]):
    X_TN = inputs(shape[1])
    X_TN[:, 3] = 0
    W_ON = draw(*shape)
    decomposition = whitening.decompose(W_ON, X_TN.T @ X_TN)
    expected = svd_llm_v2(W_ON, X_TN.T @ X_TN, 8)
    assert decomposition.damping > 0
    assert output_error(X_TN, W_ON, cut(decomposition, 8)) == pytest.approx(
        output_error(X_TN, W_ON, expected), rel=1e-6
    )


@pytest.mark.parametrize("shape", [(24, 40), (40, 24)], ids=["wide", "tall"])
@pytest.mark.parametrize("condition", [1e6, 1e10])
def test_ill_conditioned_gram_still_gives_the_best_weight(shape: tuple[int, int], condition: float):
    size = shape[1]
    Q = torch.linalg.qr(draw(size, size, seed=5)).Q
    spectrum = torch.logspace(0, -math.log10(condition), size, dtype=torch.float64)
    X_NN = spectrum.sqrt()[:, None] * Q.T  # rows that have just this Gram
    W_ON = draw(*shape)
    decomposition = whitening.decompose(W_ON, X_NN.T @ X_NN)
    for rank in (4, 12, 20):
        down, up = decomposition.factors(rank)
        s = torch.linalg.svdvals(X_NN @ W_ON.T)
        optimum = float(s[rank:].square().sum().sqrt())
        assert output_error(X_NN, W_ON, up @ down) == pytest.approx(optimum, rel=1e-6)
        assert largest(up.T @ up - torch.eye(rank)) < 1e-6


@pytest.mark.parametrize("shape", [(24, 40), (40, 24)], ids=["wide", "tall"])
@pytest.mark.parametrize("method", ["svd", "svd-llm"])
@pytest.mark.parametrize("true_rank", [0, 1, 3])
def test_weight_of_lower_rank_than_asked_gives_orthonormal_factors(shape: tuple[int, int], method: str, true_rank: int):
    W_ON = draw(shape[0], true_rank, seed=2) @ draw(true_rank, shape[1], seed=3)
    _, _, G_NN = example(shape)
    decomposition = METHODS[method].decompose(W_ON, {"gram": G_NN})
    for rank in (4, 12, 24):
        down, up = decomposition.factors(rank)
        assert bool(down.isfinite().all() and up.isfinite().all())
        assert largest(up.T @ up - torch.eye(rank)) < 1e-10
        assert largest(up @ down - W_ON) < 1e-10
        assert decomposition.loss(rank) < 1e-5 * (1 + decomposition.loss(0))


@pytest.mark.parametrize(
    ("gram", "told"),
    [
        (torch.full((8, 8), math.nan), "diagonal is nan; expected a positive number"),
        (torch.eye(8) * math.inf, "diagonal is (inf|nan); expected a positive number"),
        (-torch.eye(8), "diagonal is -1.0; expected a positive number"),
        (torch.eye(8) - 3 * torch.ones(8, 8).triu(1) - 3 * torch.ones(8, 8).tril(-1), "not positive semi-definite"),
    ],
    ids=["nan", "infinite", "negative", "indefinite"],
)
@pytest.mark.parametrize("out_features", [4, 12])
def test_gram_that_cannot_be_one_is_a_value_error(gram: torch.Tensor, told: str, out_features: int):
    with pytest.raises(ValueError, match=told):
        whitening.decompose(draw(out_features, 8), gram)


def test_splitting_batches_and_permuting_tokens_leave_the_result_unchanged():
    X_TN, W_ON = inputs(40, tokens=120).float(), draw(24, 40)
    order = torch.randperm(120, generator=torch.Generator().manual_seed(0))

    def gram(parts: list[torch.Tensor]) -> torch.Tensor:
        accumulator = Gram(40, torch.device("cpu"))
        for part in parts:
            accumulator.update(part)
        assert accumulator.tokens == 120
        return accumulator.value

    whole = gram([X_TN])
    expected = cut(whitening.decompose(W_ON, whole), 9)
    for parts in ([*X_TN.split(7)], [X_TN[order]], [X_TN.view(4, 30, 40)], [*X_TN[order].split(50)]):
        again = gram(parts)
        assert torch.linalg.matrix_norm(again - whole) < 1e-6 * torch.linalg.matrix_norm(whole)
        ours = cut(whitening.decompose(W_ON, again), 9)
        assert torch.linalg.matrix_norm(ours - expected) < 1e-5 * torch.linalg.matrix_norm(expected)


@pytest.mark.parametrize("tokens", [200, 24, 11, 1])
def test_output_gram_gives_the_same_weight_as_the_input_gram(tokens: int):
    W_ON, X_TN, G_NN = example((24, 40), tokens)
    by_inputs = METHODS["svd-llm"].decompose(W_ON, {"gram": G_NN})
    by_outputs = METHODS["svd-llm"].decompose(W_ON, {"output_gram": outputs_of(X_TN, W_ON)})
    for rank in (1, 7, 16, 24):
        assert largest(cut(by_outputs, rank) - cut(by_inputs, rank)) < (1e-8 if tokens == 200 else 1e-3)
        assert by_outputs.loss(rank) == pytest.approx(by_inputs.loss(rank), rel=1e-8, abs=1e-2 * by_inputs.loss(0))


@pytest.mark.parametrize("tokens", [1, 6, 20])
def test_rank_deficient_output_gram_gives_finite_factors(tokens: int, caplog: pytest.LogCaptureFixture):
    W_ON, X_TN, G_NN = example((24, 32), tokens)
    with caplog.at_level("INFO", logger="pared"):
        decomposition = whitening.decompose_by_outputs(W_ON, outputs_of(X_TN, W_ON))
    assert decomposition.damping > 0
    assert "rank-deficient" in caplog.text
    whole = float(torch.linalg.matrix_norm(X_TN @ W_ON.T))
    for rank in (1, 4, 12, 24):
        down, up = decomposition.factors(rank)
        assert bool(down.isfinite().all() and up.isfinite().all())
        assert largest(up.T @ up - torch.eye(rank)) < 1e-8
        optimum = output_error(X_TN, W_ON, svd_llm_v2(W_ON, G_NN, rank))
        # Where the optimum is 0, what the damping weighs against it shows.
        assert output_error(X_TN, W_ON, up @ down) <= optimum * (1 + 1e-6) + 1e-5 * whole * (rank >= tokens)


def test_directions_the_data_says_nothing_about_follow_the_weight_and_not_rounding():
    """A Gram of few outputs, added up in float32, once left them to rounding: twice the error on other text."""
    mixing = draw(96, 96, seed=9) * torch.logspace(0.5, -1, 96, dtype=torch.float64)
    seen, unseen = draw(20, 96, seed=10) @ mixing, draw(500, 96, seed=11) @ mixing
    W_ON = draw(64, 96) * torch.logspace(0, -1, 64, dtype=torch.float64)[:, None]
    gram = Gram(64, torch.device("cpu"))
    gram.update((seen @ W_ON.T).float())
    by_outputs = whitening.decompose_by_outputs(W_ON, gram.value)
    by_inputs = whitening.decompose(W_ON, seen.T @ seen)
    for rank in (24, 36, 48):
        best = output_error(unseen, W_ON, cut(by_inputs, rank))
        assert output_error(unseen, W_ON, cut(by_outputs, rank)) == pytest.approx(best, rel=1e-2)


def test_zero_weight_is_approximated_from_its_output_gram_too():
    """A layer of zeros puts out zeros; their Gram was once taken for a mistake."""
    decomposition = whitening.decompose_by_outputs(torch.zeros(4, 9), torch.zeros(4, 4))
    down, up = decomposition.factors(2)
    assert torch.equal(down, torch.zeros(2, 9, dtype=torch.float64))
    assert largest(up.T @ up - torch.eye(2)) < 1e-12


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_output_gram_that_cannot_be_one_is_a_value_error(bad: float):
    with pytest.raises(ValueError, match=r"diagonal is .*; expected a positive number"):
        whitening.decompose_by_outputs(draw(6, 8), torch.full((6, 6), bad))


def test_rounding_below_zero_in_the_output_gram_is_clamped():
    C_OO = torch.diag(torch.tensor([4.0, 1.0, -1e-12], dtype=torch.float64))
    decomposition = from_output_gram(torch.eye(3, dtype=torch.float64), C_OO)
    assert decomposition.singular_values_R.tolist() == [2, 1, 0]


def test_methods_go_by_their_own_names_and_only_plain_svd_needs_no_data():
    assert all(name == method.name for name, method in METHODS.items())
    assert not METHODS["svd"].calibrated
    assert METHODS["svd-llm"].calibrated
    assert METHODS["svd"].requires([(4, 9)], METHODS["svd"].config()) == frozenset()


@pytest.mark.parametrize(
    ("shapes", "statistic"),
    [
        ([(576, 1536)], "output_gram"),
        ([(1536, 576)], "gram"),
        ([(576, 576)], "gram"),
        ([(576, 576), (192, 576), (192, 576)], "gram"),
        ([(100, 576), (100, 576)], "output_gram"),
    ],
    ids=["down", "up", "square", "q k v", "two narrow ones"],
)
def test_whitening_collects_the_cheaper_gram(shapes: list[tuple[int, int]], statistic: str):
    assert METHODS["svd-llm"].requires(shapes, METHODS["svd-llm"].config()) == {statistic}


def test_llama_7b_at_20_percent_has_the_ranks_of_the_papers():
    assert rank_for(0.8, 4096, 4096) == 1638
    assert rank_for(0.8, 11008, 4096) == 2388
    assert rank_for(0.8, 4096, 11008) == 2388


@pytest.mark.parametrize(
    ("out_features", "in_features", "ranks"),
    [
        (4096, 4096, (1638, 1433, 1228, 1024, 819)),
        (11008, 4096, (2388, 2089, 1791, 1492, 1194)),
        (4096, 11008, (2388, 2089, 1791, 1492, 1194)),
        (2304, 768, (460, 403, 345, 288, 230)),
        (768, 768, (307,)),
        (3072, 768, (491,)),
        (768, 3072, (491,)),
    ],
    ids=["llama-attention", "llama-up-gate", "llama-down", "gpt2-c_attn", "gpt2-attn-c_proj", "gpt2-c_fc", "gpt2-mlp"],
)
def test_ranks_of_one_layer_match_the_table_of_basis_sharing(
    out_features: int, in_features: int, ranks: tuple[int, ...]
):
    for keep, rank in zip((0.8, 0.7, 0.6, 0.5, 0.4), ranks, strict=False):
        assert rank_for(keep, out_features, in_features) == rank


def test_rank_that_fits_exactly_is_not_lost_to_rounding():
    assert 0.29 * 100 < 29  # the trap: 4 x 25 weights, rank 1 costs exactly 29 of 100
    assert rank_for(0.29, 4, 25) == 1
    for out_features, in_features in ((64, 64), (48, 96), (100, 25)):
        for rank in range(1, min(out_features, in_features)):
            keep = rank * (out_features + in_features) / (out_features * in_features)
            assert rank_for(keep, out_features, in_features) == rank


@pytest.mark.parametrize("shape", [(6, 9), (6, 6)])
def test_the_output_gram_gives_the_same_weight_as_the_input_gram(shape):
    torch.manual_seed(1)
    W_ON, X_TN = torch.randn(shape, dtype=torch.float64), torch.randn(40, shape[1], dtype=torch.float64)
    Y_TO = X_TN @ W_ON.T
    by_inputs, by_outputs = (
        decomposition.factors(4)
        for decomposition in (
            whitening.decompose(W_ON, X_TN.T @ X_TN),
            whitening.decompose_by_outputs(W_ON, Y_TO.T @ Y_TO),
        )
    )
    assert torch.allclose(by_inputs.up @ by_inputs.down, by_outputs.up @ by_outputs.down, atol=1e-9)


def test_a_rank_deficient_output_gram_is_filled_by_the_weight():
    torch.manual_seed(2)
    W_ON, X_TN = torch.randn(8, 12, dtype=torch.float64), torch.randn(3, 12, dtype=torch.float64)
    Y_TO = X_TN @ W_ON.T
    decomposition = whitening.decompose_by_outputs(W_ON, Y_TO.T @ Y_TO)
    down, up = decomposition.factors(5)
    W_new = up @ down
    assert decomposition.damping > 0
    assert torch.allclose(X_TN @ W_new.T, Y_TO, atol=1e-4)  # three directions hold all the data
    # The two that are left over are the best two of what the weight does beside the data.
    beside_ON = W_ON - up[:, :3] @ (up[:, :3].T @ W_ON)
    best = torch.linalg.svdvals(beside_ON)[2:].square().sum()
    assert float((W_ON - W_new).square().sum()) == pytest.approx(float(best), rel=1e-3)


def test_a_weight_with_dead_rows_is_decomposed_by_its_outputs():
    torch.manual_seed(3)
    W_ON, X_TN = torch.randn(6, 9, dtype=torch.float64), torch.randn(40, 9, dtype=torch.float64)
    W_ON[2] = 0
    Y_TO = X_TN @ W_ON.T
    down, up = whitening.decompose_by_outputs(W_ON, Y_TO.T @ Y_TO).factors(5)
    assert torch.allclose(up @ down, W_ON, atol=1e-6)


@pytest.mark.parametrize("shape", [(4, 9), (9, 4)])
def test_dead_inputs_leave_the_plain_svd_and_not_an_error(shape: tuple[int, int]):
    """A layer behind a dead activation once ended a whole compression."""
    W_ON = draw(*shape)
    by_gram = whitening.decompose(W_ON, torch.zeros(shape[1], shape[1]))
    by_output_gram = whitening.decompose_by_outputs(W_ON, torch.zeros(shape[0], shape[0]))
    plain = svd.decompose(W_ON).factors(2)
    for decomposition in (by_gram, by_output_gram):
        down, up = decomposition.factors(2)
        assert largest(up @ down - plain.up @ plain.down) < 1e-9
        assert decomposition.damping == 1.0
