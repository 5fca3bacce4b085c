"""Sparsity by formula: the papers' identities, exact means, limits, and brute force."""

import itertools
import math
from collections.abc import Callable

import pytest
import torch

from pared.allocation.dsa import ScoreHistogram, parse, sparsities
from pared.allocation.sparsity import (
    alphapruning,
    eigenvalues,
    er,
    global_threshold,
    hill_alpha,
    least_loss,
    mixture,
    outlier_ratio,
    owl,
    pruning_loss,
    uniform,
)
from pared.allocation.sparsity_budget import MOST, meet, shift_to_mean, spread
from pared.errors import ParedError

WEIGHTS = torch.tensor([1.0, 5.0, 2.0, 9.0, 1.0])
STATISTIC = torch.tensor([0.3, 4.0, 0.9, 2.2, 1.0])

Formula = Callable[[torch.Tensor, float, "torch.Tensor | None"], torch.Tensor]
BY_STATISTIC: dict[str, Formula] = {
    "owl": lambda x, s, w: owl(x, s, weights=w),
    "owl-wide": lambda x, s, w: owl(x, s, 0.5, w),
    "alphapruning": lambda x, s, w: alphapruning(x, s, weights=w),
    "alphapruning-wide": lambda x, s, w: alphapruning(x, s, 1.0, w),
    "prune": lambda x, s, w: spread(x, s, 0.3, "prune", w),
}


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def mean(s: torch.Tensor, weights: torch.Tensor | None) -> float:
    return float(s.mean() if weights is None else (s * weights).sum() / weights.sum())


def histogram(x: torch.Tensor) -> ScoreHistogram:
    found = ScoreHistogram()
    found.update(x)
    return found


@pytest.mark.parametrize("weights", [None, WEIGHTS])
@pytest.mark.parametrize("target", [0.0, 0.01, 0.3, 0.5, 0.8, 0.97, 0.9999])
@pytest.mark.parametrize("formula", sorted(BY_STATISTIC))
def test_the_mean_is_exact_and_every_sparsity_is_in_range(formula: str, target: float, weights: torch.Tensor | None):
    s = BY_STATISTIC[formula](STATISTIC, target, weights)
    assert mean(s, weights) == pytest.approx(target, abs=1e-9)
    assert bool(((s >= 0) & (s < 1)).all())


@pytest.mark.parametrize("formula", sorted(BY_STATISTIC))
def test_equal_statistics_give_uniform_sparsity(formula: str):
    for value in (0.0, 1e-30, 7.0, 1e30):
        s = BY_STATISTIC[formula](torch.full((5,), value, dtype=torch.float64), 0.6, WEIGHTS)
        assert s.tolist() == pytest.approx([0.6] * 5, abs=1e-12)


@pytest.mark.parametrize("target", [0.05, 0.6, 0.95])
@pytest.mark.parametrize("formula", sorted(BY_STATISTIC))
def test_units_in_another_order_have_their_sparsities_in_that_order(formula: str, target: float):
    order = [4, 2, 0, 1, 3]
    s = BY_STATISTIC[formula](STATISTIC, target, WEIGHTS)
    permuted = BY_STATISTIC[formula](STATISTIC[order], target, WEIGHTS[order])
    torch.testing.assert_close(permuted, s[order], rtol=0, atol=1e-12)


@pytest.mark.parametrize("formula", sorted(BY_STATISTIC))
def test_statistics_that_are_not_finite_and_targets_out_of_range_are_refused(formula: str):
    for bad in (math.nan, math.inf):
        with pytest.raises(ParedError, match="not a finite number"):
            BY_STATISTIC[formula](torch.tensor([1.0, bad]), 0.5, None)
    for target in (-0.01, 1.0, math.nan):
        with pytest.raises(ParedError, match="sparsity is the fraction of the weights that become zero"):
            BY_STATISTIC[formula](STATISTIC, target, None)


def test_a_clamp_moves_all_others_by_one_number():
    s = shift_to_mean(torch.tensor([0.0, 0.5, 0.6, 1.2]), 0.5)
    assert s.tolist() == pytest.approx([0.0, 0.45, 0.55, MOST], abs=1e-6)
    assert shift_to_mean(torch.tensor([0.1, 0.3]), 0.6).tolist() == pytest.approx([0.5, 0.7])


def test_a_mean_that_limits_do_not_allow_is_refused():
    with pytest.raises(ParedError, match=r"sparsity 0\.5 cannot be met: the limits of the units allow 0 to 0\.3"):
        meet(lambda t: torch.tensor([0.0, t], dtype=torch.float64), 0, 0.6, 0.5, None)
    with pytest.raises(ParedError, match="there are no units"):
        uniform(0, 0.5)


def test_uniform_is_uniform():
    assert uniform(3, 0.7).tolist() == pytest.approx([0.7] * 3)


def test_outlier_ratio_counts_in_percent_what_is_above_a_multiple_of_the_mean():
    x = torch.tensor([1.0] * 18 + [10.0, 60.0])  # the mean is 4.4
    assert outlier_ratio(x, 5) == pytest.approx(5)
    assert outlier_ratio(x, 2) == pytest.approx(10)
    assert outlier_ratio(torch.full((10,), 0.1), 1.5) == 0
    assert outlier_ratio(torch.zeros(4)) == 0


@pytest.mark.parametrize("multiple", [2.0, 3.0, 5.0, 7.0, 10.0])
def test_outlier_ratio_of_a_histogram_is_close_to_the_exact_one(multiple: float):
    x = torch.exp(2 * torch.randn(200_000, generator=seeded()))
    assert outlier_ratio(histogram(x), multiple) == pytest.approx(outlier_ratio(x, multiple), rel=4e-3)


def test_owl_is_the_papers_formula_and_a_program_with_its_sign_flipped():
    d, target, width = STATISTIC.double(), 0.7, 0.08
    density = 2 * width * (d - d.min()) / (d.max() - d.min())
    density = density - density.mean() + (1 - target)
    torch.testing.assert_close(owl(d, target), 1 - density, rtol=0, atol=1e-14)
    program = parse("W:(NO_OP)-(MEAN)-(NO_OP)-(8)-(KEEP)")
    assert torch.equal(sparsities(d, target, program.width, program.sign), owl(d, target))
    assert float(owl(d, target).max() - owl(d, target).min()) == pytest.approx(2 * width)
    assert int(owl(d, target).argmin()) == int(d.argmax())


def pareto(n: int, alpha: float, seed: int) -> torch.Tensor:
    u = torch.rand(n, generator=seeded(seed), dtype=torch.float64)
    return (0.37 * (1 - u) ** (-1 / (alpha - 1))).sort().values


@pytest.mark.parametrize("tail", ["xmin_mid", "xmin_peak"])
@pytest.mark.parametrize("alpha", [1.8, 2.5, 4.0])
@pytest.mark.parametrize("scale", [1e-20, 1.0, 1e20])
def test_the_exponent_of_pareto_eigenvalues_is_recovered(tail: str, alpha: float, scale: float):
    for n, seed in ((2000, 0), (4000, 1)):
        found = hill_alpha(scale * pareto(n, alpha, seed), tail)  # type: ignore[arg-type]
        assert found == pytest.approx(alpha, rel=0.05)


def test_the_tail_at_the_middle_is_the_papers_formula():
    e = [1.0, 2.0, 3.0, 4.0, 8.0, 32.0]
    expected = 1 + 3 / (math.log(4) + math.log(8) + math.log(32) - 3 * math.log(4))
    assert hill_alpha(torch.tensor(e)) == pytest.approx(expected, rel=1e-12)


def test_the_tail_at_the_peak_leaves_out_a_bulk_that_follows_no_power_law():
    bulk = 0.05 + 0.45 * torch.rand(2000, generator=seeded(), dtype=torch.float64)
    e = torch.cat([bulk, pareto(3000, 3.0, 1) / 0.37]).sort().values  # the power law begins at 1, and the peak is there
    assert hill_alpha(e, "xmin_peak") == pytest.approx(3.0, rel=0.05)


def test_the_tail_at_the_peak_begins_no_lower_than_the_peak_even_where_that_would_fit_better():
    bulk = pareto(4000, 3.0, 0) / 0.37
    cluster = 5 + 0.02 * torch.rand(600, generator=seeded(), dtype=torch.float64)
    e = torch.cat([bulk[bulk < 5], cluster]).sort().values  # as one power law from 1 on the exponent would be near 3
    assert hill_alpha(e, "xmin_peak") > 50


def test_eigenvalues_are_those_of_the_gram_without_its_zeros():
    W = torch.randn(7, 4, generator=seeded())
    torch.testing.assert_close(eigenvalues(W), torch.linalg.eigvalsh((W.T @ W).double()), rtol=1e-5, atol=0)
    rank_one = torch.outer(torch.arange(1.0, 6), torch.arange(1.0, 4))
    assert eigenvalues(rank_one).tolist() == pytest.approx([55.0 * 14])
    with pytest.raises(ParedError, match="fewer than two different"):
        hill_alpha(eigenvalues(rank_one))
    with pytest.raises(ParedError, match="fewer than two different"):
        hill_alpha(torch.ones(10), "xmin_peak")
    with pytest.raises(ParedError, match="the largest eigenvalue"):
        eigenvalues(torch.zeros(3, 3))


def test_alphapruning_is_the_papers_formula_and_spares_heavy_tails():
    a, p, target, eps = STATISTIC.double(), WEIGHTS.double(), 0.6, 0.3
    q = (1 - eps) + 2 * eps * (a - a.min()) / (a.max() - a.min())
    torch.testing.assert_close(alphapruning(a, target, eps), target * q / q.mean(), rtol=0, atol=1e-14)
    expected = q * target * p.sum() / (p * q).sum()
    torch.testing.assert_close(alphapruning(a, target, eps, p), expected, rtol=0, atol=1e-14)
    assert float(expected.max()) < 1
    assert int(expected.argmin()) == int(a.argmin())


def test_alphapruning_at_eighty_percent_stays_below_one():
    alphas = torch.tensor([1.0, 1.1, 1.2, 5.0])
    q = 0.7 + 0.6 * (alphas.double() - 1) / 4
    assert float((0.8 * q / q.mean()).max()) > 1  # the paper's formula does not
    s = alphapruning(alphas, 0.8)
    assert float(s.max()) == MOST
    assert float(s.mean()) == pytest.approx(0.8, abs=1e-12)


SHAPES = [(64, 64), (16, 64), (256, 64), (64, 256), (1000, 64)]


def test_er_densities_are_in_proportion_until_one_is_full():
    s = er(SHAPES, 0.9)
    density = (1 - s) / torch.tensor([(m + n) / (m * n) for m, n in SHAPES], dtype=torch.float64)
    torch.testing.assert_close(density / density[0], torch.ones_like(density), rtol=1e-9, atol=0)
    parameters = torch.tensor([m * n for m, n in SHAPES], dtype=torch.float64)
    for target in (0.0, 0.2, 0.5, 0.9, 0.99):
        assert mean(er(SHAPES, target), parameters) == pytest.approx(target, abs=1e-9)
        assert float(er(SHAPES, target, by_parameters=False).mean()) == pytest.approx(target, abs=1e-9)
    assert float(er(SHAPES, 0.2)[1]) == 0
    assert er([(32, 32)] * 3, 0.4).tolist() == pytest.approx([0.4] * 3)


def test_er_plus_keeps_the_last_weight_dense():
    s = er(SHAPES, 0.3, plus=True)
    parameters = torch.tensor([m * n for m, n in SHAPES], dtype=torch.float64)
    assert float(s[-1]) == pytest.approx(0, abs=1e-12)
    assert mean(s, parameters) == pytest.approx(0.3, abs=1e-9)
    with pytest.raises(ParedError, match=r"cannot be met: .* allow 0 to"):
        er(SHAPES, 0.9, plus=True)
    with pytest.raises(ParedError, match=r"sparsity 0\.5 cannot be met: .* allow 0 to 0"):
        er([(8, 8)], 0.5, plus=True)


def test_one_threshold_prunes_what_a_sort_of_everything_prunes():
    units = [
        torch.exp(torch.randn(n, generator=seeded(n))) * scale for n, scale in ((300, 1.0), (500, 3.0), (200, 0.2))
    ]
    everything = torch.cat(units)
    for pruned in (1, 137, 500, 900):
        threshold = float(everything.sort().values[pruned - 1])
        expected = [float((unit <= threshold).double().mean()) for unit in units]
        found = global_threshold(units, pruned / 1000)
        assert found.tolist() == pytest.approx(expected, abs=4e-6)  # no unit loses all
    order = [2, 0, 1]
    permuted = global_threshold([units[i] for i in order], 0.6)
    torch.testing.assert_close(permuted, global_threshold(units, 0.6)[order], rtol=0, atol=1e-9)


def test_one_threshold_of_histograms_is_that_of_vectors():
    units = [torch.exp(torch.randn(100_000, generator=seeded(i))) * 10**i for i in range(3)]
    exact, found = global_threshold(units, 0.7), global_threshold([histogram(unit) for unit in units], 0.7)
    torch.testing.assert_close(found, exact, rtol=0, atol=1e-4)
    assert float(found.mean()) == pytest.approx(0.7, abs=1e-9)


@pytest.mark.parametrize("target", [0.0, 0.25, 0.5, 0.9])
def test_scores_that_are_equal_are_shared_out_in_proportion(target: float):
    units = [torch.full((10,), 2.0), torch.full((30,), 2.0), torch.zeros(0).new_full((5,), 2.0)]
    assert global_threshold(units, target).tolist() == pytest.approx([target] * 3, abs=1e-9)
    assert global_threshold([torch.zeros(10), torch.zeros(3)], target).tolist() == pytest.approx([target] * 2, abs=1e-9)


@pytest.mark.parametrize("by_parameters", [True, False])
def test_limits_of_units_are_kept_and_the_others_make_up_for_them(by_parameters: bool):
    units = [torch.rand(400, generator=seeded(0)), 10 + torch.rand(100, generator=seeded(1))]
    weights = torch.tensor([400.0, 100.0]) if by_parameters else None
    for function in (global_threshold, least_loss):
        s = function(units, 0.5, by_parameters=by_parameters, most=[0.3 if not by_parameters else 0.55, 0.9])
        assert float(s[0]) <= 0.55
        assert mean(s, weights) == pytest.approx(0.5, abs=1e-9)
        with pytest.raises(ParedError, match=r"cannot be met: the limits of the units allow 0 to 0\.4"):
            function(units, 0.5, by_parameters=by_parameters, most=0.4)
        with pytest.raises(ParedError, match="the largest sparsity of a unit"):
            function(units, 0.5, by_parameters=by_parameters, most=1.5)


def test_pruning_loss_is_the_sum_of_the_cheapest():
    losses = torch.tensor([4.0, 1.0, 3.0, 2.0])
    assert [pruning_loss(losses, s) for s in (0, 0.25, 0.5, 0.625, 1)] == pytest.approx([0, 1, 3, 4.5, 10])
    x = torch.exp(2 * torch.randn(50_000, generator=seeded()))
    for s in (0.1, 0.5, 0.9, 0.99):
        exact = float(x.double().sort().values[: round(s * 50_000)].sum())
        assert pruning_loss(histogram(x), s) == pytest.approx(exact, rel=1e-3)
    with pytest.raises(ParedError, match="in \\[0, 1\\]"):
        pruning_loss(losses, 1.1)


@pytest.mark.parametrize("by_parameters", [True, False])
def test_least_loss_is_brute_forces(by_parameters: bool):
    units = [torch.rand(n, generator=seeded(n), dtype=torch.float64) ** 3 for n in (4, 8, 6)]

    def total(s: "torch.Tensor | tuple[float, ...]") -> float:
        return sum(pruning_loss(unit, float(fraction)) for unit, fraction in zip(units, s, strict=True))

    counts = torch.tensor([4.0, 8.0, 6.0], dtype=torch.float64)
    grid = [[k / n for k in range(n + 1)] for n in (4, 8, 6)]
    for target in (1 / 3, 0.5, 0.75):
        s = least_loss(units, target, by_parameters=by_parameters)
        weights = counts if by_parameters else None
        assert mean(s, weights) == pytest.approx(target, abs=1e-9)
        candidates = [
            total(choice)
            for choice in itertools.product(*grid)
            if mean(torch.tensor(choice, dtype=torch.float64), weights) >= target - 1e-9
        ]
        assert total(s) <= min(candidates) + 1e-5  # MOST is a little below 1


def test_least_loss_takes_from_the_unit_whose_weights_cost_nothing():
    s = least_loss([torch.zeros(50), torch.ones(50), torch.full((100,), 5.0)], 0.25)
    assert s.tolist() == pytest.approx([MOST, 2e-6 / 2, 0], abs=2e-6)


@pytest.mark.parametrize("group", [4, 8, 16])
def test_a_mixture_of_equal_blocks_comes_within_half_a_step_of_the_target(group: int):
    s = owl(torch.rand(24, generator=seeded(group)), 0.53)
    found = mixture(s, group)
    assert abs(found.achieved - 0.53) <= 0.5 / group / 24 + 1e-12
    assert found.achieved == pytest.approx(sum(found.removed) / group / 24, abs=1e-12)
    for removed, wish in zip(found.removed, s.tolist(), strict=True):
        assert abs(removed - wish * group) < 1


@pytest.mark.parametrize("seed", range(6))
def test_a_mixture_is_brute_forces(seed: int):
    s = 0.9 * torch.rand(8, generator=seeded(seed), dtype=torch.float64)
    weights = torch.randint(1, 30, (8,), generator=seeded(seed + 100)).double()
    found = mixture(s, 4, 0.5, weights)
    choices = [sorted({min(math.floor(x * 4), 3), min(math.floor(x * 4) + 1, 3)}) for x in s.tolist()]
    target = 0.5 * 4 * float(weights.sum())

    def rank(removed: tuple[int, ...]) -> tuple[float, float]:
        distance = abs(sum(n * w for n, w in zip(removed, weights.tolist(), strict=True)) - target)
        cost = sum(w * (n - 4 * x) ** 2 for n, w, x in zip(removed, weights.tolist(), s.tolist(), strict=True))
        return round(distance, 9), cost

    best = min(itertools.product(*choices), key=rank)
    assert rank(found.removed) == pytest.approx(rank(best), abs=1e-9)
    assert found.target == 0.5


def test_a_mixture_of_many_sizes_is_close_all_the_same():
    s = 0.3 + 0.4 * torch.rand(60, generator=seeded(), dtype=torch.float64)
    weights = (1e6 + 1e5 * torch.rand(60, generator=seeded(1), dtype=torch.float64)).round()
    found = mixture(s, 8, weights=weights)
    assert abs(found.achieved - found.target) < 2e-5


def test_a_mixture_leaves_whole_numbers_alone_and_something_in_every_group():
    assert mixture(torch.tensor([0.5, 0.75, 0.25]), 4).removed == (2, 3, 1)
    assert mixture(torch.full((3,), 0.3, dtype=torch.float64), 10).removed == (3, 3, 3)
    found = mixture(torch.full((4,), 0.97), 4)
    assert found.removed == (3, 3, 3, 3)
    assert found.achieved == pytest.approx(0.75)
    assert found.target == pytest.approx(0.97)
    with pytest.raises(ParedError, match="M at least 2"):
        mixture(torch.tensor([0.5]), 1)
    with pytest.raises(ParedError, match=r"expected a number in \[0, 1\)"):
        mixture(torch.tensor([0.2, 1.0]), 4)
