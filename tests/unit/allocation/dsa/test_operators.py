"""Every operator against values computed by hand, as one of a weighted vector, and on extreme inputs."""

import itertools
import math

import pytest
import torch

from pared.allocation.dsa import POST, PRE, REDUCE, Program, importance
from pared.errors import ParedError

E = math.e
LN2 = math.log(2)

PRE_ORACLE = {
    "NO_OP": ([1.0, -2.0], [1.0, -2.0]),
    "ABS": ([1.0, -2.0], [1.0, 2.0]),
    "LOG": ([E, 1.0, 0.0, -3.0], [1 + 1e-6 / E, 1e-6, 1e-6, 1e-6]),
    "PAPER_LOG": ([E, 1.0, 1 / E], [1.0, 0.0, -1.0]),
    "ABSLOG": ([0.0, -E, E, 1 / E], [0.0, 1.0, 1.0, -1.0]),
    "PAPER_ABSLOG": ([E, 1.0, 1 / E], [1.0, 0.0, 1.0]),
    "POW": ([3.0, -2.0], [9.0, 4.0]),
    "SQRT": ([9.0, 0.0], [3.0, 0.0]),
    "EXP": ([0.0, 1.0, LN2], [1.0, E, 2.0]),
    "NORMALIZE": ([1.0, 2.0, 3.0], [-1.0, 0.0, 1.0]),
    "NORM": ([2.0, 4.0, 6.0], [-1.0, 0.0, 1.0]),
    "MMS": ([1.0, 2.0, 5.0], [0.0, 0.25, 1.0]),
    "SIGMOID": ([0.0, math.log(3)], [0.5, 0.75]),
    "TANH": ([0.0, LN2], [0.0, 0.6]),
    "SOFTMAX": ([0.0, math.log(3)], [0.25, 0.75]),
    "LOGSOFTMAX": ([0.0, math.log(3)], [math.log(0.25), math.log(0.75)]),
}
REDUCE_ORACLE = {
    "MEAN": ([1.0, 2.0, 6.0], 3.0),
    "VAR": ([1.0, 2.0, 6.0], 7.0),
    "STD": ([2.0, 4.0], math.sqrt(2)),
    "GEOMETRIC_MEAN": ([1.0, 2.0, 4.0], 2.0),
    "L1_NORM": ([-1.0, 2.0, 6.0], 3.0),
    "FROBENIUS_NORM": ([3.0, -4.0], 5.0),
    "ENTROPY": ([2.0, 2.0, -7.0, 0.0], LN2),
    "PAPER_ENTROPY": ([E, 1.0, 0.0, 2.0], -E - 2 * LN2),
    "CORREF": ([3.0, 4.0], 1.0),
    "RANK": ([0.0, 4.0], 1.0),
}
POST_ORACLE = {
    "NO_OP": (-2.5, -2.5),
    "SIN": (math.pi / 6, 0.5),
    "COS": (math.pi / 3, 0.5),
    "TAN": (math.pi / 4, 1.0),
    "ASIN": (0.5, math.pi / 6),
    "ACOS": (0.5, math.pi / 3),
    "ATAN": (1.0, math.pi / 4),
    "EXP": (LN2, 2.0),
    "LOG": (E**2, 2.0),
    "SQRT": (9.0, 3.0),
    "ABS": (-2.5, 2.5),
    "SIGMOID": (math.log(3), 0.75),
    "TANH": (LN2, 0.6),
    "SOFTPLUS": (math.log(3), math.log(4)),
}


def f64(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_every_operator_has_an_oracle():
    assert (set(PRE_ORACLE), set(REDUCE_ORACLE), set(POST_ORACLE)) == (set(PRE), set(REDUCE), set(POST))


@pytest.mark.parametrize("name", sorted(PRE_ORACLE))
def test_functions_of_a_vector_have_their_values(name: str):
    given, expected = PRE_ORACLE[name]
    found = PRE[name].apply(f64(*given), torch.ones(len(given), dtype=torch.float64))
    torch.testing.assert_close(found, f64(*expected), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", sorted(REDUCE_ORACLE))
def test_reductions_have_their_values(name: str):
    given, expected = REDUCE_ORACLE[name]
    found = REDUCE[name].apply(f64(*given), torch.ones(len(given), dtype=torch.float64))
    assert found.shape == ()
    assert float(found) == pytest.approx(expected, rel=1e-13)


@pytest.mark.parametrize("name", sorted(POST_ORACLE))
def test_functions_of_a_scalar_have_their_values(name: str):
    given, expected = POST_ORACLE[name]
    assert float(POST[name].apply(f64(given))) == pytest.approx(expected, rel=1e-13)


@pytest.mark.parametrize("name", [*PRE, *REDUCE, *POST])
def test_inputs_are_left_as_they_were(name: str):
    x, w = f64(0.0, -1.0, 0.5, 2.0), f64(1, 2, 3, 4)
    before = x.clone(), w.clone()
    operators = [table[name] for table in (PRE, REDUCE) if name in table]
    for operator in operators:
        found = operator.apply(x, w)
        assert found.data_ptr() != x.data_ptr()
        found.add_(1)
    if name in POST:
        POST[name].apply(x).add_(1)
    assert torch.equal(x, before[0])
    assert torch.equal(w, before[1])


@pytest.mark.parametrize(("pre", "reduce"), [*itertools.product(PRE, REDUCE)])
def test_counts_are_repetitions(pre: str, reduce: str):
    x, w = f64(0.3, 1.7, 0.05, 2.5, 0.9), f64(3, 1, 4, 2, 7)
    expanded = x.repeat_interleave(w.long())
    ones = torch.ones_like(expanded)
    y, y_expanded = PRE[pre].apply(x, w), PRE[pre].apply(expanded, ones)
    torch.testing.assert_close(y.repeat_interleave(w.long()), y_expanded, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(
        REDUCE[reduce].apply(y, w), REDUCE[reduce].apply(y_expanded, ones), rtol=1e-11, atol=1e-13, equal_nan=True
    )


@pytest.mark.parametrize("scale", [1e-30, 1e30])
@pytest.mark.parametrize("pre", ["NORMALIZE", "NORM", "MMS"])
def test_scale_free_functions_have_no_scale(pre: str, scale: float):
    x, w = f64(0.3, 1.7, 0.05, 2.5, 0.9), f64(3, 1, 4, 2, 7)
    torch.testing.assert_close(PRE[pre].apply(x * scale, w), PRE[pre].apply(x, w), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_reductions_follow_the_scale_they_should(scale: float):
    x, w = f64(0.3, 1.7, 0.05, 2.5, 0.9), f64(3, 1, 4, 2, 7)
    for name in ("MEAN", "STD", "GEOMETRIC_MEAN", "L1_NORM", "FROBENIUS_NORM"):
        found = float(REDUCE[name].apply(x * scale, w))
        assert found == pytest.approx(float(REDUCE[name].apply(x, w)) * scale, rel=1e-12)
    assert float(REDUCE["VAR"].apply(x * scale, w)) == pytest.approx(float(REDUCE["VAR"].apply(x, w)) * scale**2)
    assert float(REDUCE["ENTROPY"].apply(x * scale, w)) == pytest.approx(float(REDUCE["ENTROPY"].apply(x, w)))


@pytest.mark.parametrize("value", [0.1, 1e-30, 1e30, 1 / 3])
def test_a_million_equal_values_vary_by_nothing_after_any_function(value: float):
    x = torch.full((1_000_003,), value, dtype=torch.float64)
    w = torch.ones_like(x)
    for pre in PRE:
        y = PRE[pre].apply(x, w)
        if bool(y.isfinite().all()):
            assert float(REDUCE["VAR"].apply(y, w)) == 0, pre
            assert float((y - y[0]).abs().max()) <= 1e-13 * float(y[0].abs()), pre
    assert float(PRE["NORMALIZE"].apply(x, w).abs().max()) == 0
    assert float(PRE["MMS"].apply(x, w).abs().max()) == 0
    assert not bool(PRE["NORM"].apply(x, w).isfinite().any())
    assert float(REDUCE["ENTROPY"].apply(x, w)) == pytest.approx(math.log(1_000_003), rel=1e-9)


def test_geometric_mean_of_a_million_does_not_overflow():
    x = torch.rand(1_000_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 0.5
    exact = math.exp(math.fsum(math.log(v) for v in x.tolist()) / 1_000_000)
    assert float(REDUCE["GEOMETRIC_MEAN"].apply(x, torch.ones_like(x))) == pytest.approx(exact, rel=1e-12)
    assert float(REDUCE["GEOMETRIC_MEAN"].apply(f64(0.0, 5.0), f64(1, 1))) == 0


def test_softmax_and_softplus_are_stable():
    assert PRE["SOFTMAX"].apply(f64(1e30, 0.0), f64(2, 5)).tolist() == [0.5, 0.0]
    torch.testing.assert_close(PRE["SOFTMAX"].apply(f64(1000.0, 1000.0 + LN2), f64(1, 1)), f64(1 / 3, 2 / 3))
    assert POST["SOFTPLUS"].apply(f64(1e30, -1e30, -40.0)).tolist() == pytest.approx([1e30, 0.0, math.exp(-40)])


@pytest.mark.parametrize(
    ("pre", "reduce", "post", "value"),
    [
        ("EXP", "MEAN", "NO_OP", [710.0, 1.0]),  # overflow
        ("NO_OP", "MEAN", "EXP", [800.0, 800.0]),
        ("PAPER_LOG", "MEAN", "NO_OP", [0.0, 1.0]),  # a logarithm of 0
        ("PAPER_ABSLOG", "MEAN", "NO_OP", [0.0, 1.0]),
        ("PAPER_ABSLOG", "MEAN", "NO_OP", [-1.0, 1.0]),
        ("SQRT", "MEAN", "NO_OP", [-1.0, 1.0]),
        ("NORM", "MEAN", "NO_OP", [2.0, 2.0]),
        ("NO_OP", "VAR", "NO_OP", [2.0]),  # of one value
        ("NO_OP", "STD", "NO_OP", [2.0]),
        ("NO_OP", "GEOMETRIC_MEAN", "NO_OP", [-1.0, 2.0]),
        ("NO_OP", "ENTROPY", "NO_OP", [0.0, 0.0]),
        ("NO_OP", "PAPER_ENTROPY", "NO_OP", [-1.0, 2.0]),
        ("NO_OP", "CORREF", "NO_OP", [0.0, 0.0]),
        ("NO_OP", "MEAN", "ASIN", [1.5, 1.5]),
        ("NO_OP", "MEAN", "ACOS", [-1.5, -1.5]),
        ("NO_OP", "MEAN", "LOG", [0.0, 0.0]),
        ("NO_OP", "MEAN", "LOG", [-1.0, -1.0]),
        ("NO_OP", "MEAN", "SQRT", [-1.0, -1.0]),
        ("NO_OP", "MEAN", "SIN", [1e30, 1e30]),  # decided by rounding
        ("NO_OP", "MEAN", "COS", [1e7, 1e7]),
        ("NO_OP", "MEAN", "TAN", [-1e7, -1e7]),
    ],
)
def test_what_is_undefined_is_an_error_that_names_the_block_and_the_operator(
    pre: str, reduce: str, post: str, value: list[float]
):
    fine = [0.5, 0.25, 0.125]
    culprit = next(name for name in (pre, post, reduce) if name not in ("NO_OP", "MEAN"))
    with pytest.raises(ParedError, match=rf"{culprit} of block 1 is (undefined|infinite)"):
        importance(Program((pre,), reduce, (post,)), [f64(*fine), f64(*value)])


def test_an_overflow_on_the_way_is_not_hidden_by_a_function_that_forgives_it():
    with pytest.raises(ParedError, match="EXP of block 0 is infinite"):
        importance(Program(("EXP",), "MEAN", ("ATAN",)), [f64(1000.0, 1.0)])
