"""Histograms of scores: what is exact, how far off every operator is on heavy tails, and what is refused."""

import math

import pytest
import torch

from pared.allocation.dsa import POST, PRE, REDUCE, ScoreHistogram, Scores, as_scores, importance, parse
from pared.errors import ParedError


def heavy(n: int = 200_000, sigma: float = 2.0, seed: int = 0) -> torch.Tensor:
    return torch.exp(sigma * torch.randn(n, generator=torch.Generator().manual_seed(seed)))


def histogram(*parts: torch.Tensor) -> ScoreHistogram:
    found = ScoreHistogram()
    for part in parts:
        found.update(part)
    return found


def test_counts_sums_and_moments_are_exact():
    x = torch.cat([heavy(50_000), torch.zeros(7)])
    found = histogram(x)
    scores, double = found.scores(), x.double()
    assert scores.count == 50_007
    assert float((scores.values_N * scores.weights_N).sum()) == pytest.approx(float(double.sum()), rel=1e-13)
    moments, positive = found.moments, double[double > 0]
    assert (moments.count, moments.zeros) == (50_007, 7)
    assert (moments.least, moments.most) == (0.0, float(x.max()))
    assert moments.total == pytest.approx(float(double.sum()), rel=1e-13)
    assert moments.squares == pytest.approx(float(double.square().sum()), rel=1e-13)
    assert moments.logs == pytest.approx(float(positive.log().sum()), rel=1e-9)
    assert moments.squared_logs == pytest.approx(float(positive.log().square().sum()), rel=1e-13)


def test_pieces_and_merged_histograms_are_one_histogram():
    x = heavy(30_000)
    whole, pieces, other = histogram(x), histogram(x[:20], x[20:20_000].reshape(-1, 6)), histogram(x[20_000:])
    pieces.merge(other)
    a, b = whole.scores(), pieces.scores()
    assert torch.equal(a.weights_N, b.weights_N)
    torch.testing.assert_close(a.values_N, b.values_N, rtol=1e-13, atol=0)
    assert pieces.moments.count == 30_000
    assert pieces.moments.squared_logs == pytest.approx(whole.moments.squared_logs)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_every_value_lies_in_its_bin_from_the_smallest_to_the_largest(dtype: torch.dtype):
    x = torch.logspace(-38, 38, 4001, dtype=torch.float64).to(dtype)
    x = torch.cat([x[x.isfinite()], torch.tensor([1e-45, 3.4e38], dtype=torch.float64).to(dtype)])
    x = x[x.isfinite()]
    scores = histogram(x).scores()
    assert scores.count == len(x)
    assert bool((scores.values_N >= scores.lows_N * (1 - 1e-7)).all())
    assert bool((scores.values_N <= scores.highs_N * (1 + 1e-7)).all())
    normal = scores.lows_N > 1.2e-38
    assert bool((scores.highs_N[normal] / scores.lows_N[normal] <= 1 + 1 / 64 + 1e-9).all())


def test_a_million_equal_values_are_one_value_with_no_variance():
    scores = histogram(torch.full((1_000_000,), 0.1)).scores()
    assert scores.count == 1_000_000
    assert len(scores.values_N) == 1
    assert float(REDUCE["VAR"].apply(scores.values_N, scores.weights_N)) == 0
    assert float(REDUCE["ENTROPY"].apply(scores.values_N, scores.weights_N)) == pytest.approx(math.log(1e6))


@pytest.mark.parametrize("bad", [[-1e-30], [math.nan], [math.inf], [1.0, -0.5]])
def test_what_is_no_score_is_refused_and_nothing_of_it_is_kept(bad: list[float]):
    found = histogram(torch.ones(3))
    with pytest.raises(ParedError, match=r"expected numbers from 0 on"):
        found.update(torch.tensor(bad))
    assert found.moments.count == 3
    assert found.scores().count == 3


def test_what_is_beyond_float32_counts_as_its_largest_number():
    """Regression: one outlier ended a run whose weights and statistics all were finite."""
    found = histogram(torch.tensor([1.0, 1e39, 1e300], dtype=torch.float64)).scores()
    assert found.values_N.tolist() == [1.0, torch.finfo(torch.float32).max]
    assert found.weights_N.tolist() == [1, 2]


def test_infinity_and_nothing_at_all_are_refused():
    with pytest.raises(ParedError, match="expected numbers from 0"):
        histogram(torch.tensor([math.inf], dtype=torch.float64))
    with pytest.raises(ParedError, match="has seen none"):
        histogram(torch.zeros(0)).scores()
    with pytest.raises(ParedError, match="at least one and all finite"):
        Scores.of(torch.zeros(0))
    with pytest.raises(ParedError, match="at least one and all finite"):
        Scores.of(torch.tensor([1.0, math.nan]))


# Measured: 5.5e-6 at most for reductions, 5.6e-5 for functions of a vector before them.
@pytest.mark.parametrize("reduce", sorted(REDUCE))
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e25])
def test_the_error_of_every_reduction_on_heavy_tails(reduce: str, scale: float):
    x = heavy().double().mul(scale).float()
    exact = float(REDUCE[reduce].apply(Scores.of(x).values_N, Scores.of(x).weights_N))
    scores = histogram(x).scores()
    found = float(REDUCE[reduce].apply(scores.values_N, scores.weights_N))
    assert math.isfinite(exact)
    assert exact != 0
    assert abs(found - exact) / abs(exact) < 1e-5


@pytest.mark.parametrize("reduce", sorted(set(REDUCE) - {"CORREF", "RANK"}))
@pytest.mark.parametrize("pre", sorted(PRE))
def test_the_error_of_every_function_of_a_vector_on_heavy_tails(pre: str, reduce: str):
    x = heavy(sigma=0.5 if pre == "EXP" else 2.0)  # exp of more than 709 is infinite
    values = []
    for scores in (Scores.of(x), histogram(x).scores()):
        y = PRE[pre].apply(scores.values_N, scores.weights_N)
        values.append(float(REDUCE[reduce].apply(y, scores.weights_N)))
    exact, found = values
    if math.isnan(exact):
        assert math.isnan(found)
    else:  # |ln x| has a kink at 1 and its logarithm a pole
        assert abs(found - exact) / max(abs(exact), 1.0) < (
            3e-3 if (pre, reduce) == ("PAPER_ABSLOG", "GEOMETRIC_MEAN") else 1e-4
        )


@pytest.mark.parametrize("post", sorted(POST))
def test_the_error_of_every_function_of_a_scalar_on_heavy_tails(post: str):
    inside = post in ("ASIN", "ACOS")
    program = parse(f"W:({'SIGMOID' if inside else 'ABSLOG'})-({'MEAN' if inside else 'VAR'})-({post})-(8)")
    x = heavy(sigma=0.8)
    exact, found = importance(program, [x, histogram(x)]).tolist()
    assert abs(found - exact) / abs(exact) < 1e-4


def test_the_count_above_a_threshold_is_exact_for_vectors_and_interpolated_in_bins():
    x = torch.tensor([0.0, 1.0, 2.0, 2.0, 5.0])
    assert [Scores.of(x).above(t) for t in (-1, 0, 1, 1.5, 2, 5)] == [5, 4, 3, 3, 1, 0]
    big = heavy()
    scores = histogram(big).scores()
    for threshold in (1e-3, 0.1, 1.0, 7.3, 50.0, 700.0):
        exact = int((big > threshold).sum())
        in_bin = float(scores.weights_N[(scores.lows_N <= threshold) & (threshold < scores.highs_N)].sum())
        assert abs(scores.above(threshold) - exact) <= in_bin
        assert abs(scores.above(threshold) - exact) <= max(2, 5e-3 * exact)
    assert scores.above(0) == 200_000
    assert scores.above(1e9) == 0


def test_whatever_holds_scores_is_read_the_same():
    x = torch.tensor([1.0, 2.0, 4.0])  # powers of two are alone in their bins
    for found in (x, Scores.of(x), histogram(x)):
        assert as_scores(found).values_N.tolist() == [1, 2, 4]


def test_scores_scale_with_their_bins():
    scores = histogram(torch.rand(1000, generator=torch.Generator().manual_seed(0))).scores()
    assert scores.scaled(8.0).above(4.0) == pytest.approx(scores.above(0.5))
    assert scores.scaled(8.0).mean == pytest.approx(8 * scores.mean)
