"""Every statistic keeps the promises of the one protocol: merge, state and width are the same for all of them."""

import itertools

import pytest
import torch

from pared import ParedError
from pared.calibration import per_token, statistic_kind
from pared.calibration.statistics import STATISTICS, Fisher, Gram, Statistic, backward_data_fraction

CPU = torch.device("cpu")
OUT, IN = 4, 70  # wider than one strip of a Gram
EVERY = (*STATISTICS, "fisher:2", "fisher:3")


def empty(name: str) -> Statistic:
    kind = statistic_kind(name)
    return kind.accumulator(kind.features(OUT, IN), CPU)


def batch(name: str, examples: int, whole: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what a statistic is given for examples of 9 tokens; integers, whose sums are exact, if ``whole``."""
    of = statistic_kind(name).of
    widths = {"output": (OUT, OUT), "input_pair": (IN, IN)}.get(of, (IN, OUT))
    x, g = (
        torch.randint(-4, 5, (examples, 9, width)).float() if whole else torch.randn(examples, 9, width)
        for width in widths
    )
    return x, g


def seen(name: str, *batches: tuple[torch.Tensor, torch.Tensor]) -> Statistic:
    statistic = empty(name)
    for x, g in batches:
        statistic.update(x, g)
    return statistic


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("name", EVERY)
def test_nothing_seen_is_zero_over_no_tokens(name: str) -> None:
    statistic = empty(name)
    assert statistic.tokens == 0
    assert not statistic.value.any()
    assert statistic.value.dtype == torch.float64
    assert statistic.finite()


@pytest.mark.parametrize("name", EVERY)
def test_merging_in_any_order_is_having_seen_everything(name: str) -> None:
    """Of integers, whose sums are exact, to the last bit; of six examples each, which leave no group open."""
    batches = [batch(name, 6, whole=True) for _ in range(3)]
    together = seen(name, *batches)
    for order in itertools.permutations(batches):
        merged = empty(name)
        for one in order:
            merged.merge(seen(name, one))
        assert torch.equal(merged.value, together.value)
        assert merged.tokens == together.tokens == 162


@pytest.mark.parametrize("name", EVERY)
def test_merging_equals_having_seen_everything(name: str) -> None:
    """To the rounding of float64 sums, where the batches are the same."""
    first, second = batch(name, 6), batch(name, 3)
    together, apart = seen(name, first, second), seen(name, first)
    apart.merge(seen(name, second))
    assert relative(apart.value, together.value) < 1e-12
    assert apart.tokens == together.tokens == 81


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("sizes", [[12], [1] * 12, [5, 7], [6, 2, 4]])
def test_how_examples_are_split_into_batches_does_not_matter(name: str, sizes: list[int]) -> None:
    """Not at all for integers; to the rounding of float32 products, 1e-6, for other numbers."""
    for whole, tolerance in ((True, 0.0), (False, 1e-6)):
        x, g = batch(name, 12, whole)
        split = seen(name, *zip(x.split(sizes), g.split(sizes), strict=True))
        assert relative(split.value, seen(name, (x, g)).value) <= tolerance
        assert split.tokens == 108


@pytest.mark.parametrize("name", EVERY)
def test_a_restored_statistic_goes_on_to_the_same_bits(name: str) -> None:
    """Five examples: groups of 2 and of 3 are interrupted in the middle."""
    first, second, more = batch(name, 5), batch(name, 4), batch(name, 3)
    interrupted = seen(name, first)
    state = {key: tensor.clone() for key, tensor in interrupted.state_dict().items()}
    restored = empty(name)
    restored.update(*more)
    restored.load_state_dict(state)
    assert torch.equal(restored.value, interrupted.value)
    for statistic in (interrupted, restored):
        statistic.update(*second)
        statistic.merge(seen(name, more))
    assert torch.equal(restored.value, interrupted.value)
    assert restored.tokens == interrupted.tokens == 108


@pytest.mark.parametrize("name", EVERY)
def test_a_restored_statistic_is_a_copy(name: str) -> None:
    original, restored = seen(name, batch(name, 5)), empty(name)
    restored.load_state_dict(original.state_dict())
    before = restored.value.clone()
    original.update(*batch(name, 4))
    assert torch.equal(restored.value, before)


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_number_that_is_not_finite_is_noticed_and_kept(name: str, bad: float) -> None:
    x, g = batch(name, 2)
    statistic = seen(name, (x, g))
    assert statistic.finite()
    (g if statistic.of in ("output_grad", "weight_grad") else x)[1, 3, 2] = bad
    statistic.update(x, g)
    statistic.update(*batch(name, 2))
    assert not statistic.finite()
    restored = empty(name)
    restored.load_state_dict(statistic.state_dict())
    assert not restored.finite()


@pytest.mark.parametrize("name", [name for name in EVERY if statistic_kind(name).of == "input"])
def test_a_statistic_of_inputs_is_the_same_in_a_backward_pass(name: str) -> None:
    x, g = batch(name, 3)
    forward = empty(name)
    forward.update(x)
    assert torch.equal(forward.value, seen(name, (x, g)).value)


@pytest.mark.parametrize(
    ("name", "other"),
    [
        ("gram", "mean_gram"),
        ("gram", "output_gram"),
        ("energy", "magnitude"),
        ("fisher:2", "fisher:3"),
        ("output_gradient_full", "output_gradient_diagonal"),
        ("output_gradient_scalar", "output_gradient_diagonal"),
        ("cross", "gram"),
    ],
)
def test_only_what_is_of_one_kind_is_merged(name: str, other: str) -> None:
    with pytest.raises(ParedError, match=r"cannot merge .* into .* merge statistics of one name and width"):
        empty(name).merge(empty(other))


def test_a_state_of_another_width_or_group_is_refused() -> None:
    with pytest.raises(ParedError, match=r"Gram of 5 features \(input\): expected a saved sum of shape \(25,\), got"):
        Gram(5, CPU).load_state_dict(Gram(6, CPU).state_dict())
    with pytest.raises(ParedError, match="3 examples squared together: got a state of groups of 2"):
        Fisher(5, CPU, 3).load_state_dict(Fisher(5, CPU, 2).state_dict())
    with pytest.raises(ParedError, match="got a state of another statistic"):
        Fisher(5, CPU).load_state_dict(Gram(5, CPU).state_dict())


def test_fisher_by_hand() -> None:
    """Two examples of two tokens, one output: ``dW = Σ_t g_t x_t`` is (5, 1) and (2, -6)."""
    x = torch.tensor([[[1.0, 1.0], [2.0, 0.0]], [[1.0, -2.0], [0.0, 1.0]]])
    g = torch.tensor([[[1.0], [2.0]], [[2.0], [-2.0]]])
    apart, together = Fisher(2, CPU), Fisher(2, CPU, batch=2)
    for statistic in (apart, together):
        statistic.update(x, g)
    assert apart.value.tolist() == [25 + 4, 1 + 36]
    assert together.value.tolist() == [49, 25]


def test_an_open_group_counts_as_a_group_of_its_own_when_it_is_merged() -> None:
    x, g = torch.tensor([[[1.0]], [[1.0]], [[1.0]]]), torch.tensor([[[1.0]], [[2.0]], [[4.0]]])
    first, second = Fisher(1, CPU, batch=2), Fisher(1, CPU, batch=2)
    first.update(x, g)  # (1 + 2)², 4 is open
    second.update(x[:1], g[:1])  # 1 is open
    first.merge(second)
    assert first.value.item() == 9 + 16 + 1
    first.update(x[:1], g[:1])  # the open group of the first is filled: (4 + 1)²
    assert first.value.item() == 9 + 25 + 1


def test_a_value_per_token_knows_sums_from_means() -> None:
    for name in EVERY:
        once, twice = batch(name, 6, whole=True), seen(name)
        for _ in range(2):
            twice.update(*once)
        torch.testing.assert_close(per_token(name, twice), per_token(name, seen(name, once)))


def test_mean_squares_need_a_quarter_of_the_windows_and_everything_else_all_of_them() -> None:
    assert backward_data_fraction({"output_gradient_scalar", "output_gradient_diagonal"}) == 0.25
    assert backward_data_fraction({"output_gradient_diagonal", "fisher:4"}) == 1.0
    assert backward_data_fraction({"output_gradient_full"}) == 1.0
