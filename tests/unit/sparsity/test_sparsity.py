"""What is pruned: counts that are exact, scores that are the papers', weights that stay bit for bit."""

import math

import pytest
import torch

from pared.errors import ParedError
from pared.sparsity import METHODS, NM, Pattern, Unstructured, magnitude, masks, parse, wanda

SOME = (Unstructured(0.5), Unstructured(0.37), NM(2, 4), NM(1, 8))
PATTERNS = pytest.mark.parametrize("pattern", SOME, ids=str)
WANDAS = [(pattern, False) for pattern in SOME] + [(pattern, True) for pattern in SOME[:2]]  # no variant for N:M


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def energies(features: int, seed: int = 1) -> torch.Tensor:
    return draw(features, seed=seed).exp()


def zeros_per_row(weight_ON: torch.Tensor) -> list[int]:
    return (weight_ON == 0).sum(dim=1).tolist()


# Patterns.


def test_n_of_m_counts_what_is_kept():
    assert parse("1:4") == NM(kept=1, group=4)
    assert NM(1, 4).sparsity == 0.75
    assert zeros_per_row(magnitude.prune(draw(3, 16), NM(1, 4)).weight) == [12, 12, 12]


@pytest.mark.parametrize("pattern", [NM(2, 4), NM(4, 8), NM(1, 1), Unstructured(0.5), Unstructured(0.0)], ids=str)
def test_a_pattern_reads_back_from_its_text(pattern: Pattern):
    assert parse(str(pattern)) == pattern


@pytest.mark.parametrize("text", ["", "2:", ":4", "2:4:8", "2.5:4", "half", "50%", "2/4"])
def test_text_that_is_no_pattern_is_quoted(text: str):
    with pytest.raises(ValueError, match=r"expected N:M such as 2:4, or a sparsity such as 0\.5") as raised:
        parse(text)
    assert repr(text) in str(raised.value)


@pytest.mark.parametrize("text", ["0:4", "5:4", "-1:4", "0:0", "-2:-4"])
def test_groups_that_cannot_keep_so_many_are_refused(text: str):
    with pytest.raises(ValueError, match="at least 1 and at most M of M kept"):
        parse(text)


@pytest.mark.parametrize("sparsity", ["1", "-0.1", "50", "nan", "inf"])
def test_sparsity_that_is_no_fraction_is_refused(sparsity: str):
    with pytest.raises(ValueError, match="at least 0 and below 1"):
        parse(sparsity)


def test_counts_are_not_lost_to_rounding():
    assert int(100 * 0.29) == 28  # the traps
    assert int(10 * (1 - 0.9)) == 0
    assert Unstructured(0.29).zeros(100) == 29
    for count in range(1, 200):
        for zeros in range(count):
            assert Unstructured(zeros / count).zeros(count) == zeros
            assert Unstructured(1 - (count - zeros) / count).zeros(count) == zeros
    assert Unstructured(0.5).zeros(7) == 3
    assert Unstructured(0.999999).zeros(7) == 6


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
def test_inputs_that_groups_do_not_fill_are_refused(method: str):
    statistics = {"energy": torch.ones(10), "gram": torch.eye(10)}
    with pytest.raises(ValueError, match="pattern 2:4 on 10 inputs: expected a multiple of 4"):
        METHODS[method].prune(draw(3, 10), NM(2, 4), statistics)


# Masks.


@pytest.mark.parametrize("sparsity", [0, 0.1, 0.29, 0.5, 0.7, 0.9, 0.99])
@pytest.mark.parametrize("shape", [(7, 100), (64, 33), (1, 10), (10, 1)])
def test_counts_are_exact(shape: tuple[int, int], sparsity: float):
    out_features, in_features = shape
    W_ON, pattern = draw(*shape), Unstructured(sparsity)
    of_matrix = round(1000 * sparsity) * out_features * in_features // 1000
    of_row = round(1000 * sparsity) * in_features // 1000
    assert int((magnitude.prune(W_ON, pattern).weight == 0).sum()) == of_matrix
    assert zeros_per_row(wanda.prune(W_ON, energies(in_features), pattern).weight) == [of_row] * out_features
    variant = wanda.prune(W_ON, energies(in_features), pattern, variant=True)
    assert int((variant.weight == 0).sum()) == of_matrix


@pytest.mark.parametrize("pattern", [NM(2, 4), NM(1, 4), NM(4, 8), NM(3, 5), NM(1, 1), NM(20, 40)], ids=str)
def test_every_aligned_group_keeps_n(pattern: NM):
    W_ON = draw(9, 40)
    for pruned in (magnitude.prune(W_ON, pattern), wanda.prune(W_ON, energies(40), pattern)):
        for start in range(0, 40, pattern.group):
            assert zeros_per_row(pruned.weight[:, start : start + pattern.group]) == [pattern.group - pattern.kept] * 9


def test_of_equal_scores_the_earlier_goes_first_and_no_more_than_asked():
    ones = torch.ones(3, 8)
    expected = torch.ones(24)
    expected[:10] = 0
    assert torch.equal(magnitude.prune(ones, Unstructured(10 / 24)).weight, expected.view(3, 8))
    row = torch.tensor([0.0, 0, 0, 1, 1, 1, 1, 1])
    assert torch.equal(wanda.prune(ones, torch.ones(8), Unstructured(3 / 8)).weight, row.expand(3, 8))
    group = torch.tensor([0.0, 0, 0, 1])
    assert torch.equal(wanda.prune(ones, torch.ones(8), NM(1, 4)).weight, group.repeat(3, 2))
    some = torch.tensor([[2.0, 1, 3, 1, 1, 0]])
    assert masks.per_row(some, Unstructured(0.5)).tolist() == [[True, False, True, False, True, False]]


def test_masks_do_not_depend_on_how_the_weight_lies_in_memory():
    W_NO = draw(12, 6)
    for pattern in (Unstructured(0.5), NM(2, 4)):
        assert torch.equal(magnitude.prune(W_NO.T, pattern).mask, magnitude.prune(W_NO.T.clone(), pattern).mask)


# Scores.


def test_wanda_of_a_worked_example():
    W_ON = torch.tensor([[4.0, 0, 1, -1], [3, -2, -1, -3], [-3, 1, 0, 2]])
    norm_N = torch.tensor([1.0, 2, 8, 3])
    expected_scores = [[4, 0, 8, 3], [3, 4, 8, 9], [3, 2, 0, 6]]
    assert wanda.scores(W_ON, norm_N.square()).tolist() == expected_scores
    pruned = wanda.prune(W_ON, norm_N.square(), Unstructured(0.5))
    assert pruned.weight.tolist() == [[4, 0, 1, 0], [0, 0, -1, -3], [-3, 0, 0, 2]]
    assert pruned.mask.tolist() == [[True, False, True, False], [False, False, True, True], [True, False, False, True]]
    assert wanda.prune(W_ON, norm_N.square(), NM(1, 2)).weight.tolist() == [[4, 0, 1, 0], [0, -2, 0, -3], [-3, 0, 0, 2]]


def test_magnitude_of_a_worked_example():
    W_ON = torch.tensor([[4.0, 0.5, 1, -1.5], [30, -20, -10, -40]])
    assert magnitude.prune(W_ON, Unstructured(0.5)).weight.tolist() == [[0, 0, 0, 0], [30, -20, -10, -40]]
    assert magnitude.prune(W_ON, NM(2, 4)).weight.tolist() == [[4, 0, 0, -1.5], [30, 0, 0, -40]]


@PATTERNS
def test_wanda_on_equal_inputs_is_magnitude_within_a_row(pattern: Pattern):
    W_ON = draw(6, 40)
    ours = wanda.prune(W_ON, torch.full((40,), 3.7), pattern).mask
    rows = torch.cat([magnitude.prune(row[None], pattern).mask for row in W_ON])
    assert torch.equal(ours, rows)


@pytest.mark.parametrize(("pattern", "variant"), WANDAS, ids=str)
def test_scaling_an_input_and_its_weights_against_each_other_leaves_wandas_mask(pattern: Pattern, variant: bool):
    W_ON, energy_N = draw(16, 40), energies(40)
    scale_N = draw(40, seed=3).exp()
    before = wanda.prune(W_ON, energy_N, pattern, variant).mask
    assert torch.equal(wanda.prune(W_ON / scale_N, energy_N * scale_N**2, pattern, variant).mask, before)
    assert not torch.equal(wanda.prune(W_ON / scale_N, energy_N, pattern, variant).mask, before)


@PATTERNS
@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_the_scale_of_weights_and_energies_does_not_matter(pattern: Pattern, scale: float):
    W_ON, energy_N = draw(6, 40).float(), energies(40).float()
    assert torch.equal(magnitude.prune(W_ON * scale, pattern).mask, magnitude.prune(W_ON, pattern).mask)
    expected = wanda.prune(W_ON, energy_N, pattern).mask
    assert torch.equal(wanda.prune(W_ON * scale, energy_N * scale, pattern).mask, expected)
    assert torch.equal(wanda.prune(W_ON, energy_N * scale, pattern).mask, expected)
    assert torch.equal(wanda.prune(W_ON, energy_N.double() * scale**3, pattern).mask, expected)


def test_an_input_that_is_always_zero_goes_first():
    energy_N = energies(8)
    energy_N[5] = 0
    W_ON = draw(4, 8)
    W_ON[:, 5] = 100
    assert not bool(wanda.prune(W_ON, energy_N, Unstructured(0.125)).mask[:, 5].any())
    assert bool(magnitude.prune(W_ON, Unstructured(0.125)).mask[:, 5].all())


def by_bisection(scores_ON: torch.Tensor, sparsity: float) -> tuple[torch.Tensor, float]:
    """Wanda's variant as the paper's code states it: α in [0, 0.8], from 0.4, to 1e-3."""
    low, high, alpha = 0.0, 0.8, 0.4
    ordered_ON = scores_ON.sort(dim=1).values
    while True:
        counts_O = (ordered_ON.cumsum(dim=1) <= alpha * ordered_ON.sum(dim=1, keepdim=True)).sum(dim=1)
        limit_O = torch.stack([row[count] for row, count in zip(ordered_ON, counts_O, strict=True)])
        mask_ON = scores_ON >= limit_O[:, None]
        found = float((~mask_ON).double().mean())
        if abs(found - sparsity) <= 1e-3:
            return mask_ON, alpha
        low, high = (low, alpha) if found > sparsity else (alpha, high)
        alpha = (low + high) / 2


@pytest.mark.parametrize("sparsity", [0.3, 0.5, 0.7])
def test_the_variant_is_what_bisection_comes_close_to(sparsity: float):
    W_ON = draw(32, 250) * draw(32, 1, seed=2).exp() + 0.1 * draw(32, 250, seed=3).pow(3)
    scores_ON = wanda.scores(W_ON, energies(250))
    expected_ON, alpha = by_bisection(scores_ON, sparsity)
    mask_ON = masks.by_share(scores_ON, Unstructured(sparsity))
    assert int((~mask_ON).sum()) == round(sparsity * mask_ON.numel())
    assert int((mask_ON != expected_ON).sum()) <= 1e-3 * mask_ON.numel()
    assert bool((mask_ON <= expected_ON).all() or (mask_ON >= expected_ON).all())  # the same order of going
    given_up_O = (scores_ON * ~mask_ON).sum(dim=1) / scores_ON.sum(dim=1)
    assert float((given_up_O - alpha).abs().max()) < 0.02
    assert len(set((~mask_ON).sum(dim=1).tolist())) > 3  # outputs lose different numbers of weights


def test_the_variant_of_a_worked_example():
    # Running shares: 0.1, 0.3, 0.6, 1 and 0.02, 0.05, 0.1 (the earlier of equals), 1: the four smallest go.
    scores_ON = torch.tensor([[4.0, 3, 2, 1], [2, 3, 90, 5]])
    expected = [[True, True, True, False], [False, False, True, False]]
    assert masks.by_share(scores_ON, Unstructured(0.5)).tolist() == expected


def test_the_variant_takes_outputs_of_zeros_first():
    mask_ON = masks.by_share(torch.tensor([[1.0, 2, 3, 4], [0, 0, 0, 0]]), Unstructured(0.5))
    assert mask_ON.tolist() == [[True] * 4, [False] * 4]


# Results.


@PATTERNS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_kept_weights_are_bit_identical_and_the_others_zero(pattern: Pattern, dtype: torch.dtype):
    W_ON = draw(8, 40).to(dtype)
    before = W_ON.clone()
    bits = torch.int32 if dtype == torch.float32 else torch.int16
    for weight_ON, mask_ON in (magnitude.prune(W_ON, pattern), wanda.prune(W_ON, energies(40), pattern)):
        assert weight_ON.dtype == dtype
        assert torch.equal(weight_ON[mask_ON].view(bits), before[mask_ON].view(bits))
        assert not bool(weight_ON[~mask_ON].view(bits).any())  # 0.0, not -0.0
        assert int((~mask_ON).sum()) > 0
        assert torch.equal(W_ON, before)  # what was given is not written to


@pytest.mark.parametrize("pattern", [Unstructured(0), NM(4, 4)], ids=str)
def test_nothing_pruned_leaves_every_bit(pattern: Pattern):
    W_ON = draw(8, 16).float()
    W_ON[0, 0], W_ON[0, 1] = -0.0, 0.0
    for pruned in (magnitude.prune(W_ON, pattern), wanda.prune(W_ON, energies(16), pattern)):
        assert torch.equal(pruned.weight.view(torch.int32), W_ON.view(torch.int32))
        assert bool(pruned.mask.all())


@pytest.mark.parametrize(("pattern", "variant"), WANDAS, ids=str)
def test_pruning_twice_with_wanda_changes_nothing(pattern: Pattern, variant: bool):
    energy_N = energies(40)
    energy_N[[3, 17]] = 0
    once = wanda.prune(draw(8, 40), energy_N, pattern, variant)
    again = wanda.prune(once.weight, energy_N, pattern, variant)
    assert torch.equal(again.weight, once.weight)
    assert torch.equal(again.mask, once.mask)


@PATTERNS
def test_pruning_twice_by_magnitude_changes_nothing(pattern: Pattern):
    once = magnitude.prune(draw(8, 40), pattern)
    again = magnitude.prune(once.weight, pattern)
    assert torch.equal(again.weight, once.weight)
    assert torch.equal(again.mask, once.mask)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@PATTERNS
def test_weights_that_are_not_finite_are_refused(bad: float, pattern: Pattern):
    W_ON = draw(4, 8)
    W_ON[1, 2] = bad
    with pytest.raises(ValueError, match="NaN or infinite"):
        magnitude.prune(W_ON, pattern)
    with pytest.raises(ValueError, match="NaN or infinite"):
        wanda.prune(W_ON, torch.ones(8), pattern)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -1.0])
def test_energies_that_cannot_be_are_refused(bad: float):
    energy_N = torch.ones(8)
    energy_N[3] = bad
    with pytest.raises(ValueError, match="energy is negative or not finite"):
        wanda.prune(draw(4, 8), energy_N, Unstructured(0.5))


@pytest.mark.parametrize("energy", [torch.ones(7), torch.ones(1), torch.ones(8, 8), torch.ones(())])
def test_energies_of_another_width_are_refused(energy: torch.Tensor):
    with pytest.raises(ValueError, match=r"for a weight \(4, 8\): expected \(in,\)"):
        wanda.prune(draw(4, 8), energy, Unstructured(0.5))


@pytest.mark.parametrize("shape", [(8,), (2, 4, 8), (0, 8), (8, 0)])
def test_only_a_matrix_that_is_not_empty_is_pruned(shape: tuple[int, ...]):
    with pytest.raises(ValueError, match="not empty"):
        magnitude.prune(torch.ones(shape), Unstructured(0.5))


def test_the_variant_has_no_groups_and_no_negative_scores():
    with pytest.raises(ValueError, match="pattern 2:4: the variant"):
        wanda.prune(draw(4, 8), torch.ones(8), NM(2, 4), variant=True)
    with pytest.raises(ValueError, match="a score is negative"):
        masks.by_share(-torch.ones(2, 4), Unstructured(0.5))


# Methods.


def test_methods_go_by_their_own_names_and_need_only_their_statistic():
    assert all(name == method.name for name, method in METHODS.items())
    needed = {name: method.requires([(4, 9)], method.config()) for name, method in METHODS.items()}
    assert needed == {"magnitude": frozenset(), "wanda": {"energy"}, "sparsegpt": {"gram"}}
    assert [method.name for method in METHODS.values() if not method.calibrated] == ["magnitude"]


def test_options_reach_the_method():
    W_ON, X_TN = draw(8, 32), draw(100, 32, seed=1) @ draw(32, 32, seed=2)
    statistics = {"energy": X_TN.square().sum(dim=0), "gram": X_TN.T @ X_TN}
    for name, options in (
        ("wanda", {"variant": True}),
        ("sparsegpt", {"block": 4}),
        ("sparsegpt", {"damping": 10.0}),
    ):
        plain = METHODS[name].prune(W_ON, Unstructured(0.5), statistics)
        assert not torch.equal(METHODS[name].prune(W_ON, Unstructured(0.5), statistics, options).weight, plain.weight)
        defaults = METHODS[name].prune(W_ON, Unstructured(0.5), statistics, METHODS[name].config.defaults())
        assert torch.equal(defaults.weight, plain.weight)


def test_an_option_no_method_has_is_named():
    with pytest.raises(ParedError, match="method wanda has no option 'blocksize'; Valid: variant"):
        METHODS["wanda"].prune(draw(4, 8), Unstructured(0.5), {"energy": torch.ones(8)}, {"blocksize": 4})
    with pytest.raises(ParedError, match="method magnitude has no option 'block'; it has none"):
        METHODS["magnitude"].prune(draw(4, 8), Unstructured(0.5), {}, {"block": 4})


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_scores_of_every_dtype_lose_the_smallest_the_first_of_equal_ones(dtype: torch.dtype) -> None:
    scores = torch.tensor([[3.0, 1.0, 1.0, 2.0], [1.0, 1.0, 1.0, 1.0]], dtype=dtype)
    kept = masks.per_row(scores, Unstructured(0.5))
    assert kept.tolist() == [[True, False, False, True], [False, False, True, True]]
