"""The Gram: the same number however it is split, at full precision whatever the inputs and the process-wide knobs."""

import math
from collections.abc import Iterator

import pytest
import torch

from pared import ParedError, environment
from pared.calibration import Gram
from pared.calibration.precision import exact_products
from pared.environment import choose_dtype

CPU = torch.device("cpu")


def gram_of(*batches: torch.Tensor) -> Gram:
    gram = Gram(batches[0].shape[-1], CPU)
    for batch in batches:
        gram.update(batch)
    return gram


def exact(x: torch.Tensor) -> torch.Tensor:
    x_TN = x.reshape(-1, x.shape[-1]).double()
    return x_TN.T @ x_TN


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float(torch.linalg.matrix_norm(found - expected) / torch.linalg.matrix_norm(expected))


@pytest.fixture
def knob() -> Iterator[object]:
    """The CPU's float32 precision knob, put back afterwards."""
    knob = torch.backends.mkldnn.matmul
    before, general = knob.fp32_precision, torch.get_float32_matmul_precision()
    yield knob
    torch.set_float32_matmul_precision(general)
    knob.fp32_precision = before


def test_gram_is_x_transposed_x():
    x = torch.randn(50, 12)
    gram = gram_of(x)
    assert gram.value.dtype == torch.float64
    assert relative(gram.value, exact(x)) < 1e-6
    assert gram.tokens == 50


def test_gram_is_symmetric_to_the_last_bit():
    value = gram_of(torch.randn(50, 33), torch.randn(20, 33)).value
    assert torch.equal(value, value.T)


def test_leading_dimensions_are_tokens():
    x = torch.randn(3, 5, 2, 12)
    gram = gram_of(x)
    assert gram.tokens == 30
    assert relative(gram.value, exact(x)) < 1e-6


def test_integers_are_summed_exactly():
    x = torch.randint(-9, 10, (200, 16)).float()
    assert torch.equal(gram_of(*x.split(23)).value, exact(x))


def test_no_tokens_leave_the_gram_empty():
    gram = gram_of(torch.empty(0, 6))
    assert gram.tokens == 0
    assert torch.equal(gram.value, torch.zeros(6, 6, dtype=torch.float64))


def test_merging_equals_having_seen_everything():
    first, second = torch.randn(40, 12), torch.randn(25, 12)
    together, apart = gram_of(first, second), gram_of(first)
    apart.merge(gram_of(second))
    assert torch.equal(apart.value, together.value)
    assert apart.tokens == together.tokens == 65


@pytest.mark.parametrize("features", [1, 5, 63, 64, 65, 192, 193, 500])
def test_inputs_wider_than_a_panel_give_the_same_gram(features: int):
    x = torch.randint(-9, 10, (60, features)).float()
    gram = gram_of(x, x[:7])
    assert torch.equal(gram.value, exact(x) + exact(x[:7]))
    other = gram_of(x[:9])
    gram.merge(other)
    assert torch.equal(gram.value, exact(x) + exact(x[:7]) + exact(x[:9]))


@pytest.mark.parametrize("features", [576, 1536])
def test_half_of_a_square_is_held(features: int):
    held = sum(tensor.nbytes for tensor in Gram(features, CPU).state_dict().values())
    assert held < 0.56 * features * features * 8


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("mean", [0.0, 3.0])
def test_half_precision_inputs_are_accumulated_in_float32_or_better(dtype: torch.dtype, mean: float):
    x = (torch.randn(4096, 96) + mean).to(dtype)
    gram = gram_of(*x.split(1024))
    assert relative(gram.value, exact(x)) < 1e-6
    assert gram.dtype == dtype


def test_many_small_batches_do_not_wear_the_sum_down():
    x = torch.rand(20, 8).bfloat16()
    gram = Gram(8, CPU)
    for _ in range(500):
        gram.update(x)
    assert relative(gram.value, 500 * exact(x)) < 1e-6


@pytest.mark.parametrize("setting", ["high", "medium"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_low_matmul_precision_set_by_the_user_does_not_reach_the_gram(knob: object, setting: str, dtype: torch.dtype):
    """On machines with bfloat16 units the Gram of float32 inputs was once wrong by 3e-4."""
    torch.set_float32_matmul_precision(setting)
    x = torch.randn(512, 64).to(dtype)
    assert relative(gram_of(x).value, exact(x)) < 1e-6
    assert torch.get_float32_matmul_precision() == setting


@pytest.mark.parametrize(
    ("dtype", "inside"), [(torch.bfloat16, "bf16"), (torch.float16, "ieee"), (torch.float32, "ieee")]
)
@pytest.mark.parametrize("before", ["none", "ieee", "bf16"])
def test_only_bfloat16_values_are_multiplied_in_bfloat16(knob: object, dtype: torch.dtype, inside: str, before: str):
    knob.fp32_precision = before
    with exact_products(dtype):
        assert knob.fp32_precision == inside
    assert knob.fp32_precision == before


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("before", ["none", "ieee", "bf16"])
def test_precision_is_put_back_after_an_exception(knob: object, dtype: torch.dtype, before: str):
    knob.fp32_precision = before
    with pytest.raises(ZeroDivisionError), exact_products(dtype):
        raise ZeroDivisionError
    assert knob.fp32_precision == before


def test_precision_is_put_back_when_an_update_fails(knob: object):
    knob.fp32_precision = "ieee"
    with pytest.raises(RuntimeError):
        Gram(8, CPU).update(torch.randn(4, 9).bfloat16())
    assert knob.fp32_precision == "ieee"


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("feature", [0, 190, 250, 399])
def test_a_single_number_that_is_not_finite_is_noticed(bad: float, feature: int):
    gram = gram_of(torch.randn(30, 400))
    assert gram.finite()
    x = torch.randn(30, 400)
    x[11, feature] = bad
    gram.update(x)
    gram.update(torch.randn(30, 400))
    assert not gram.finite()
    healthy = gram_of(torch.randn(3, 400))
    healthy.merge(gram)
    assert not healthy.finite()


def test_asked_dtype_is_taken_and_half_models_stay_as_they_are():
    assert choose_dtype("float32", torch.bfloat16, CPU) == torch.float32
    assert choose_dtype("bfloat16", torch.float32, CPU) == torch.bfloat16
    assert choose_dtype("auto", torch.float16, CPU) == torch.float16
    assert choose_dtype("auto", torch.bfloat16, CPU) == torch.bfloat16


@pytest.mark.parametrize(("speedup", "chosen"), [(2.0, torch.bfloat16), (1.1, torch.float32), (0.5, torch.float32)])
def test_float32_model_runs_in_bfloat16_only_where_that_is_clearly_faster(
    monkeypatch: pytest.MonkeyPatch, speedup: float, chosen: torch.dtype
):
    monkeypatch.delenv("PARED_COMPUTE_DTYPE")
    environment._bfloat16_is_faster.cache_clear()
    monkeypatch.setattr(environment, "_seconds", lambda dtype, _: 1.0 if dtype == torch.float32 else 1 / speedup)
    assert choose_dtype("auto", torch.float32, CPU) == chosen
    monkeypatch.setattr(environment, "_seconds", lambda *_: pytest.fail("measured twice, so it may choose twice"))
    assert choose_dtype("auto", torch.float32, CPU) == chosen
    environment._bfloat16_is_faster.cache_clear()


@pytest.mark.parametrize("settled", ["float32", "bfloat16"])
def test_the_environment_settles_what_a_float32_model_runs_in(monkeypatch: pytest.MonkeyPatch, settled: str):
    monkeypatch.setenv("PARED_COMPUTE_DTYPE", settled)
    monkeypatch.setattr(environment, "_bfloat16_is_faster", lambda _: pytest.fail("it was measured"))
    assert choose_dtype("auto", torch.float32, CPU) == getattr(torch, settled)
    assert choose_dtype("auto", torch.float16, CPU) == torch.float16
    assert choose_dtype("float32", torch.float32, CPU) == torch.float32


def test_no_dtype_in_the_environment_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PARED_COMPUTE_DTYPE", "bf16")
    with pytest.raises(ParedError, match="PARED_COMPUTE_DTYPE 'bf16'"):
        choose_dtype("auto", torch.float32, CPU)
