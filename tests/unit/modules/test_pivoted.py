"""Pivoted storage holds the very weight of the factors in k² fewer numbers, and its coefficients stay small."""

import copy
import math

import pytest
import torch
from torch import nn

from pared.engine.install import install
from pared.lowrank import Factors, svd
from pared.lowrank.pivot import other_columns, pivot, unpivot
from pared.modules import LowRankLinear, PivotedLinear
from pared.schema.plan import LowRank, Plan, SitePlan, pivoted_rank_for

SHAPES = [(64, 48, 20), (48, 64, 20), (96, 32, 32), (60, 40, 39), (50, 30, 1), (1, 7, 1), (7, 1, 1), (300, 200, 120)]


def random_factors(m: int, n: int, k: int, seed: int = 0) -> Factors:
    random = torch.Generator().manual_seed(seed)
    return Factors(
        down=torch.randn(k, n, generator=random, dtype=torch.float64),
        up=torch.randn(m, k, generator=random, dtype=torch.float64),
    )


def pivoted_layer(factors: Factors, dtype: torch.dtype, bias: torch.Tensor | None = None) -> PivotedLinear:
    stored = pivot(factors)
    (m, k), n = factors.up.shape, factors.down.shape[1]
    layer = PivotedLinear(n, m, k, bias is not None, dtype=dtype)
    layer.set_weight(stored.pivots_K, stored.W_OK, stored.C_KR)
    if bias is not None:
        layer.bias.data.copy_(bias)
    return layer


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


# The mathematics.


@pytest.mark.parametrize("shape", SHAPES)
def test_pivots_and_coefficients_rebuild_the_weight(shape):
    factors = random_factors(*shape)
    stored = pivot(factors)
    W = factors.up @ factors.down
    rebuilt = torch.empty_like(W)
    rebuilt[:, stored.pivots_K] = stored.W_OK
    rest = other_columns(stored.pivots_K, shape[1])
    rebuilt[:, rest] = stored.W_OK @ stored.C_KR
    assert relative(rebuilt, W) < 1e-12
    assert stored.error == pytest.approx(float((rebuilt - W).abs().max()), abs=1e-12)
    assert sorted(stored.pivots_K.tolist() + rest.tolist()) == list(range(shape[1]))
    assert torch.equal(stored.W_OK, factors.up @ factors.down[:, stored.pivots_K])


@pytest.mark.parametrize("shape", SHAPES)
def test_two_factors_come_back_without_rounding(shape):
    stored = pivot(random_factors(*shape))
    back = unpivot(stored.pivots_K, stored.W_OK, stored.C_KR)
    assert torch.equal(back.up, stored.W_OK)
    assert torch.equal(back.down[:, stored.pivots_K], torch.eye(shape[2], dtype=torch.float64))
    assert relative(back.up @ back.down, random_factors(*shape).up @ random_factors(*shape).down) < 1e-12


def ill_conditioned(kind: str) -> Factors:
    factors = random_factors(60, 80, 30)
    if kind == "falling spectrum":
        return factors._replace(down=factors.down * torch.logspace(0, -14, 30, dtype=torch.float64)[:, None])
    if kind == "columns of very different size":
        return factors._replace(down=factors.down * torch.logspace(0, -12, 80, dtype=torch.float64))
    if kind == "nearly equal columns":
        return factors._replace(down=factors.down[:, :1] + 1e-7 * factors.down)
    if kind == "Kahan":  # where Gaussian elimination with partial pivoting alone grows as 2^k
        down = torch.eye(30, 80, dtype=torch.float64) - torch.ones(30, 80, dtype=torch.float64).triu(1)
        return factors._replace(down=down)
    if kind == "down of lower rank":
        return factors._replace(down=factors.up[:30, :11] @ factors.down[:11])
    if kind == "up of lower rank":
        return factors._replace(up=factors.up[:, :11] @ factors.down[:11, :30])
    if kind == "a repeated column":
        return factors._replace(down=factors.down[:, :1].expand(30, 80))
    return Factors(down=torch.zeros(30, 80), up=torch.zeros(60, 30))


@pytest.mark.parametrize(
    "kind",
    ["random", "falling spectrum", "columns of very different size", "nearly equal columns", "Kahan",
     "up of lower rank", "down of lower rank", "a repeated column", "zero"],
)  # fmt: skip
def test_coefficients_stay_small_and_finite_whatever_the_factors(kind):
    factors = random_factors(60, 80, 30) if kind == "random" else ill_conditioned(kind)
    stored = pivot(factors)
    W = factors.up.double() @ factors.down.double()
    assert stored.C_KR.isfinite().all()
    assert stored.C_KR.abs().max() <= 1.06
    assert stored.error <= 1e-10 * max(float(W.abs().max()), 1e-300)
    assert torch.equal(pivot(factors).pivots_K, stored.pivots_K)


@pytest.mark.parametrize("largest", [1.01, 2.0, 10.0])
def test_the_limit_on_coefficients_is_kept(largest):
    stored = pivot(random_factors(120, 100, 50), largest)
    assert stored.C_KR.abs().max() <= largest * (1 + 1e-9)


def test_factors_that_do_not_fit_are_refused():
    factors = random_factors(10, 9, 5)
    with pytest.raises(ValueError, match=r"up \(10, 5\) and down \(4, 9\)"):
        pivot(factors._replace(down=factors.down[:4]))
    with pytest.raises(ValueError, match=r"k at most in"):
        pivot(factors._replace(down=factors.down[:, :4]))
    with pytest.raises(ValueError, match="NaN or infinity"):
        pivot(factors._replace(up=factors.up / 0))
    with pytest.raises(ValueError, match="no choice of pivots"):
        pivot(factors, 1.0)


# The module.


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("biased", [False, True])
def test_the_pivoted_layer_answers_as_the_two_factors(shape, dtype, tolerance, biased):
    factors = random_factors(*shape)
    bias = torch.randn(shape[0]) if biased else None
    layer = pivoted_layer(factors, dtype, bias)
    x = torch.randn(2, 3, shape[1], dtype=torch.float64)
    expected = x @ factors.down.T @ factors.up.T + (0 if bias is None else bias)
    with torch.no_grad():
        found = layer(x.to(dtype))
        assert found.shape == (2, 3, shape[0])
        assert found.dtype == dtype
        assert relative(found, expected) < tolerance
        assert relative(layer.weight, factors.up @ factors.down) < tolerance
        assert layer(x[0, 0].to(dtype)).shape == (shape[0],)
        assert layer(x[:0].to(dtype)).shape == (0, 3, shape[0])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("biased", [False, True])
def test_it_stores_exactly_k_squared_fewer_parameters(shape, biased):
    m, n, k = shape
    layer = PivotedLinear(n, m, k, biased)
    weights = sum(parameter.numel() for name, parameter in layer.named_parameters() if name != "up.bias")
    assert weights == k * (m + n) - k * k == LowRank(rank=k, pivoted=True).parameters(m, n)
    assert weights == LowRank(rank=k).parameters(m, n) - k * k
    stored = sum(tensor.numel() * tensor.itemsize for tensor in layer.state_dict().values())
    assert stored == 4 * (weights + m * biased) + LowRank(rank=k, pivoted=True).index_bytes(m, n)


def test_a_layer_of_full_rank_has_no_other_columns():
    layer = pivoted_layer(random_factors(30, 20, 20), torch.float32, torch.randn(30))
    assert layer.down is None
    assert set(layer.state_dict()) == {"up.weight", "up.bias", "order"}
    assert layer.pivots.tolist() == list(range(20))


def test_the_parts_are_linear_layers_and_take_gradients():
    factors = random_factors(24, 16, 7)
    layer = pivoted_layer(factors, torch.float64, torch.randn(24))
    assert isinstance(layer.down, nn.Linear)
    assert isinstance(layer.up, nn.Linear)
    assert not any(name.endswith("up_proj") for name, _ in layer.named_modules())
    x = torch.randn(5, 16, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layer, (x,))
    assert torch.autograd.gradgradcheck(layer, (x,))
    layer(x).sum().backward()
    assert {name for name, p in layer.named_parameters() if p.grad is not None} == {
        "down.weight",
        "up.weight",
        "up.bias",
    }


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch.jit")
def test_it_is_differentiated_by_every_means_of_torch():
    """Regression: an autograd function of the old form broke torch.func, and lost gradients where code is compiled."""
    layer = pivoted_layer(random_factors(24, 16, 7), torch.float64)
    x = torch.randn(5, 16, dtype=torch.float64, requires_grad=True)
    expected = torch.ones(5, 24, dtype=torch.float64) @ layer.weight.detach()
    ways = {
        "grad": torch.func.grad(lambda one: layer(one).sum())(x),
        "vmap of grad": torch.func.vmap(torch.func.grad(lambda one: layer(one).sum()))(x),
        "compiled": torch.autograd.grad(torch.compile(layer, backend="aot_eager", fullgraph=True)(x).sum(), x)[0],
        "traced": torch.autograd.grad(torch.jit.trace(layer, x)(x).sum(), x)[0],
        "fx": torch.autograd.grad(torch.fx.symbolic_trace(layer)(x).sum(), x)[0],
    }
    for way, found in ways.items():
        torch.testing.assert_close(found, expected, msg=way)
    torch.testing.assert_close(torch.func.jacfwd(layer)(x[0]), layer.weight.detach())
    with torch.autograd.forward_ad.dual_level():
        dual = layer(torch.autograd.forward_ad.make_dual(x, torch.ones_like(x)))
        tangent = torch.autograd.forward_ad.unpack_dual(dual).tangent
    torch.testing.assert_close(tangent, torch.ones_like(x) @ layer.weight.T)


def test_an_exported_model_of_it_is_trained_as_the_model_is():
    """Regression: what stands before it had no gradient, and no error said so."""
    model = nn.Sequential(nn.Linear(16, 16), pivoted_layer(random_factors(24, 16, 7), torch.float32))
    x = torch.randn(5, 16, requires_grad=True)
    exported = torch.export.export(model, (x,), strict=True).module()
    found = dict(exported.named_parameters())["0.weight"]
    (gradient,) = torch.autograd.grad(exported(x).square().sum(), found)
    (expected,) = torch.autograd.grad(model(x).square().sum(), model[0].weight)
    torch.testing.assert_close(gradient, expected)


def test_gradients_of_gradients_are_the_same_where_it_is_compiled():
    """Regression: they were smaller by what goes through the layer, and no error said so."""
    layer = pivoted_layer(random_factors(16, 16, 7), torch.float64)

    def model(x: torch.Tensor) -> torch.Tensor:
        return (x * x + layer(x).tanh()).sum()

    def second(function: object) -> torch.Tensor:
        x = torch.linspace(-1, 1, 80, dtype=torch.float64).view(5, 16).requires_grad_()
        (first,) = torch.autograd.grad(function(x), x, create_graph=True)
        return torch.autograd.grad(first.square().sum(), x)[0]

    torch.testing.assert_close(second(torch.compile(model, backend="eager")), second(model))


def test_both_parts_are_called_as_modules():
    layer = pivoted_layer(random_factors(24, 16, 7), torch.float32)
    called = []
    for name in ("down", "up"):
        part = getattr(layer, name)
        part.register_forward_hook(lambda _, args, out, name=name: called.append((name, args[0].shape, out.shape)))
    layer(torch.randn(2, 3, 16))
    assert called == [("down", (2, 3, 9), (2, 3, 7)), ("up", (2, 3, 7), (2, 3, 24))]


def test_it_takes_inputs_of_any_layout_and_autocast():
    layer = pivoted_layer(random_factors(24, 16, 7), torch.float32, torch.randn(24))
    x = torch.randn(16, 5, 2).transpose(0, 2)
    torch.testing.assert_close(layer(x), nn.functional.linear(x, layer.weight, layer.bias))
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        found = layer(x)
    assert found.dtype == torch.bfloat16
    assert relative(found, layer(x).detach()) < 2e-2


def test_the_order_stays_integer_in_every_dtype():
    layer = pivoted_layer(random_factors(24, 16, 7), torch.float32)
    order = layer.order.clone()
    for cast in (copy.deepcopy(layer).half(), copy.deepcopy(layer).to(torch.bfloat16), copy.deepcopy(layer).double()):
        assert cast.order.dtype == torch.int32
        assert torch.equal(cast.order, order)
    again = PivotedLinear(**layer.entry())
    again.load_state_dict(layer.state_dict())
    assert torch.equal(again.weight, layer.weight)
    assert torch.equal(layer.pivots, pivot(random_factors(24, 16, 7)).pivots_K)


@pytest.mark.parametrize("biased", [False, True])
def test_install_takes_either_storage(biased):
    model = nn.Sequential(nn.Linear(30, 40, bias=biased))
    factors = svd.decompose(model[0].weight.detach()).factors(9)
    both = []
    for pivoted in (False, True):
        changed = copy.deepcopy(model)
        install(changed, "0", factors, pivoted)
        both.append(changed)
    assert [type(changed[0]) for changed in both] == [LowRankLinear, PivotedLinear]
    x = torch.randn(5, 30)
    torch.testing.assert_close(both[1](x), both[0](x), atol=1e-5, rtol=1e-4)


# The plan.


def test_the_rank_of_a_budget_is_that_of_the_paper_and_the_largest():
    for m, n in ((40, 60), (60, 40), (576, 1536), (7, 7), (1, 9)):
        for budget in range(0, m * n + 1, max(1, m * n // 97)):
            k, width = pivoted_rank_for(budget, m, n), m + n + 1
            assert k == int((width - math.sqrt(width**2 - 4 * budget)) / 2)
            assert k * width - k * k <= budget
            assert k == min(m, n) or (k + 1) * width - (k + 1) ** 2 > budget
    assert pivoted_rank_for(10**9, 40, 60) == 40


def test_a_plan_of_pivoted_sites_adds_up_and_survives_json():
    shape = {"kind": "q", "block": 0, "out_features": 40, "in_features": 60}
    sites = (
        SitePlan(name="a", decision=LowRank(rank=12, pivoted=True), **shape),
        SitePlan(name="b", decision=LowRank(rank=12), **shape),
    )
    plan = Plan(keep=0.5, sites=sites, model_parameters=6000, bytes_per_parameter=2)
    assert plan.after.covered_parameters == 2 * 12 * 100 - 144
    assert plan.after.model_parameters == 6000 - 4800 + 2400 - 144
    assert plan.after.bytes_on_disk == 2 * plan.after.model_parameters + 4 * 60
    assert plan.before.bytes_on_disk == 12000
    assert Plan.model_validate_json(plan.model_dump_json()) == plan
    assert (str(sites[0].decision), str(sites[1].decision)) == ("rank 12, pivoted", "rank 12")
    assert LowRank.model_validate({"kind": "low_rank", "rank": 3}) == LowRank(rank=3, pivoted=False)
