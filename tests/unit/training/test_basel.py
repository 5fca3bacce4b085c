"""Basel: bases, what they are worth, which go, and what is left of a model."""

import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import kill_when
from tiers import quick_first
from tiny_models import TINY_MODELS
from torch import nn
from transformers import PreTrainedTokenizerFast, TrainerState
from transformers.pytorch_utils import Conv1D
from typer.testing import CliRunner

from pared import ParedError, tune
from pared.checkpoint import load, verify
from pared.cli.commands import app
from pared.lowrank import whitening
from pared.modules import LowRankLinear, replace_module
from pared.progress import Silent
from pared.schema.manifest import Manifest
from pared.schema.plan import LowRank
from pared.schema.training import TrainingConfig
from pared.structure import bias_of, weight_of
from pared.training.basel.bases import bases_of_outputs, bases_of_weight
from pared.training.basel.factorise import factors_of, put_back
from pared.training.basel.importance import curvature, fisher, taylor
from pared.training.basel.layer import BasisLinear
from pared.training.basel.method import covered
from pared.training.basel.penalty import L1
from pared.training.basel.prune_callback import Prune
from pared.training.basel.schedule import falling, mass_after, prune_steps, rate_factor
from pared.training.basel.select import Weight, by_budget, keep_by_cumulative, share_for

FAMILIES = pytest.mark.parametrize("family", ["llama", "opt", "gpt2", "qwen3"])


def layer_of(
    m: int = 12, n: int = 8, new: int = 2, dtype: torch.dtype = torch.float32, bias: bool = True
) -> BasisLinear:
    return BasisLinear(torch.randn(m, n), torch.randn(m) if bias else None, new, dtype)


# The schedule.


@pytest.mark.parametrize(("steps", "first", "times"), [(30, 10, 5), (31, 10, 7), (13, 10, 9), (100, 0, 100), (2, 1, 1)])
def test_exactly_as_many_prunes_as_asked_evenly_spaced_and_none_while_keeping(
    steps: int, first: int, times: int
) -> None:
    found = prune_steps(steps, first, times)
    assert len(found) == times
    assert found[0] == first
    assert found[-1] < steps
    gaps = {later - earlier for earlier, later in itertools.pairwise(found)}
    assert not gaps or max(gaps) - min(gaps) <= 1


def test_no_steps_to_prune_in_is_an_error() -> None:
    with pytest.raises(ValueError, match="5 prunes in 0 steps"):
        prune_steps(10, 10, 5)


@pytest.mark.parametrize(("keep", "factor"), [(0.5, 1.130), (0.2, 1.357), (0.1, 1.585), (0.05, 1.879), (1.0, 1.0)])
def test_the_rate_factor_is_the_papers(keep: float, factor: float) -> None:
    assert rate_factor(keep, 1, 2) == pytest.approx(factor, abs=6e-4)


@pytest.mark.parametrize(("keeping", "pruning"), [(0, 1), (0, 0.5), (0.1, 0.2), (1, 2)])
def test_the_rate_factor_is_never_below_one_and_knows_no_unit(keeping: float, pruning: float) -> None:
    assert rate_factor(0.05, keeping, pruning) > 1
    assert rate_factor(0.05, 10 * keeping, 10 * pruning) == pytest.approx(rate_factor(0.05, keeping, pruning))


def test_the_rate_factor_is_the_mean_of_one_over_the_root_of_what_is_left() -> None:
    # One epoch of keeping, two in which what is left falls as K^t.
    places = [(index + 0.5) / 100_000 for index in range(100_000)]
    falling = sum(0.2 ** (-place / 2) for place in places) / len(places)
    assert rate_factor(0.2, 1, 2) == pytest.approx((1 + 2 * falling) / 3, rel=1e-6)


# Which bases stay.


def test_one_prune_keeps_the_fewest_bases_that_hold_the_mass() -> None:
    for seed in range(50):
        generator = torch.Generator().manual_seed(seed)
        c = torch.rand(20, generator=generator, dtype=torch.float64) * (torch.rand(20, generator=generator) > 0.3)
        for share in (0.1, 0.5, 0.9, 0.99):
            kept = keep_by_cumulative(c, share)
            assert float(c[kept].sum()) >= share * float(c.sum()) * (1 - 1e-12)
            assert float(c[kept].sum() - c[kept].min()) < share * float(c.sum())
            assert not bool(kept[c == 0].any())


def test_sizes_fall_to_what_is_asked_for_by_one_factor() -> None:
    sizes = falling(1_000_000, 0.25, 4)
    assert sizes == (707106, 500000, 353553, 250000)


def test_equal_bases_stay_together() -> None:
    assert keep_by_cumulative(torch.tensor([4.0, 1.0, 1.0, 1.0, 0.0]), 0.6).tolist() == [True, True, True, True, False]


def test_with_the_whole_mass_no_basis_that_is_worth_anything_goes() -> None:
    c = torch.tensor([5.0, 1e-20, 0.0, 1e-12])
    assert keep_by_cumulative(c, 1.0).tolist() == [True, True, False, True]


def test_bases_that_do_harm_go_first() -> None:
    assert keep_by_cumulative(torch.tensor([3.0, -5.0, 1.0]), 1.0).tolist() == [True, False, True]


def test_untrained_prunes_leave_the_mass_and_a_prefix_of_the_spectrum() -> None:
    layer = layer_of(30, 24)
    total, times = float(layer.coefficients.sum()), 10
    for _ in range(times):
        layer.keep_(keep_by_cumulative(layer.coefficients, mass_after(0.4, 1, times)))
    assert float(layer.coefficients.sum()) >= 0.4 * total
    left = int(layer.mask.sum())
    assert layer.mask.tolist() == [True] * left + [False] * (24 - left)
    assert 1 <= left < 24


def pruned_untrained(widths: dict[str, int], keep_ratio: float, times: int) -> Prune:
    layers = {name: layer_of(width, width, new=0) for name, width in widths.items()}
    weights = {name: Weight(width, width, 0) for name, width in widths.items()}
    prune = Prune(layers, weights, tuple(range(times)), keep_ratio, None, "magnitude", 1, (), nn.ModuleDict())
    for step in range(times):
        prune.on_step_begin(None, TrainerState(global_step=step))
    return prune


@pytest.mark.parametrize("times", [1, 7, 100])
@pytest.mark.parametrize("keep_ratio", [0.05, 0.2, 0.5])
def test_the_mass_is_met_in_narrow_layers_however_many_prunes_there_are(keep_ratio: float, times: int) -> None:
    """A prune of 100 may drop 3% of the mass; where the least basis holds more, none ever fell: 20 to 46% were left."""
    widths = {"eight": 8, "sixteen": 16, "thirty": 30, "wide": 64}
    prune = pruned_untrained(widths, keep_ratio, times)
    for name, layer in prune.layers.items():
        c_R = layer.w.detach().square()
        fewest = keep_by_cumulative(c_R, keep_ratio)
        assert torch.equal(layer.mask, fewest), name
        left = float(c_R[layer.mask].sum() / c_R.sum())
        assert float(layer.mass) == pytest.approx(left, rel=1e-5)
        least = float(c_R[layer.mask].min() / c_R.sum())
        assert keep_ratio <= left < keep_ratio + least
    reached = prune.reached()
    assert reached["mass_asked"] == keep_ratio
    assert reached["mass_left_most"] == max(float(layer.mass) for layer in prune.layers.values())
    assert reached["bases"] == sum(len(layer.mask) for layer in prune.layers.values())
    assert reached["bases_left"] < reached["bases"]


def test_a_mass_that_one_basis_alone_is_more_than_is_told() -> None:
    prune = pruned_untrained({"eight": 8, "wide": 64}, 0.05, 100)
    left = float(prune.layers["eight"].mass)
    assert left > 0.1
    (told,) = prune.shortfalls()
    assert "keep_ratio 0.05 is missed in" in told
    assert f"most in eight ({left:.3g} in 1 of 8 bases)" in told
    assert pruned_untrained({"wide": 64}, 0.5, 100).shortfalls() == []


def test_a_prune_takes_no_more_than_is_due_of_what_is_left_over() -> None:
    prune = pruned_untrained({"eight": 8}, 0.05, 100)
    layer = layer_of(8, 8, new=0)
    again = Prune({"eight": layer}, prune.weights, prune.steps, 0.05, None, "magnitude", 1, (), nn.ModuleDict())
    for step in range(100):
        again.on_step_begin(None, TrainerState(global_step=step))
        assert float(layer.mass) >= mass_after(0.05, step + 1, 100) - 1e-6


def test_the_penalty_is_the_mass_that_is_left_and_pulls_at_coefficients_alone() -> None:
    layers = {"a": layer_of(6, 5, new=1), "b": layer_of(7, 9, new=1)}
    penalty = L1(layers, 3.0, first=4)
    assert float(penalty.penalty().detach()) == pytest.approx(1.0)
    with torch.no_grad():
        layers["a"].w.mul_(0.5)
    value = penalty.penalty()
    assert float(value.detach()) == pytest.approx((0.25 + 1) / 2)
    value.backward()
    for name, layer in layers.items():
        before = float(layer.w.detach().square().sum()) * (4 if name == "a" else 1)
        torch.testing.assert_close(layer.w.grad, layer.w.detach() / before)  # 2 w / Σc₀, of two layers the mean
        assert layer.U_new.grad is None
    for step, begun in ((3, False), (4, True), (9, True)):
        penalty.on_step_begin(None, TrainerState(global_step=step))
        assert penalty.begun == begun


def test_a_budget_over_all_weights_is_met_and_never_passed() -> None:
    importance = {"a": torch.rand(16), "b": torch.rand(10) * 5, "c": torch.rand(16) * 0.1}
    weights = {"a": Weight(16, 20, 2), "b": Weight(10, 40, 2), "c": Weight(16, 16, 2)}
    dense = sum(weight.dense for weight in weights.values())
    for keep in (0.3, 0.5, 0.8, 1.0):
        masks = by_budget(importance, weights, math.floor(keep * dense))
        stored = sum(weights[name].stored(int(mask.sum())) for name, mask in masks.items())
        assert stored <= keep * dense
        for name, mask in masks.items():
            if not weights[name].grows(int(mask.sum())) and bool(mask.any()):
                assert float(importance[name][mask].min()) >= float(importance[name][~mask].max())


def test_a_weight_that_would_grow_keeps_all_its_bases() -> None:
    masks = by_budget({"a": torch.ones(8)}, {"a": Weight(8, 8, 2)}, 64)
    assert masks["a"].all()


def test_what_was_dropped_is_not_taken_up_again_to_fill_a_budget() -> None:
    left = torch.tensor([3.0, -math.inf, -1.0, -math.inf])
    masks = by_budget({"a": left}, {"a": Weight(20, 20, 0)}, 160)
    assert masks["a"].tolist() == [True, False, True, False]


def test_a_budget_below_the_new_bases_is_refused() -> None:
    with pytest.raises(ValueError, match="the new bases of all weights are 32 by themselves"):
        by_budget({"a": torch.ones(8)}, {"a": Weight(8, 8, 2)}, 31)


def test_the_mass_for_a_size_leaves_that_size() -> None:
    torch.manual_seed(1)
    spectra = {name: torch.rand(40).sort(descending=True).values for name in "abc"}
    weights = {name: Weight(40, 60, 4) for name in "abc"}
    share = share_for(spectra, weights, 3600)
    stored = [sum(weights[name].stored(int(keep_by_cumulative(c, at).sum())) for name, c in spectra.items())
              for at in (share, min(1.0, share + 0.02))]  # fmt: skip
    assert stored[0] <= 3600 < stored[1]


# What a basis is worth.


def test_taylor_is_the_loss_of_a_quadratic_with_a_diagonal_hessian() -> None:
    h, b, c = torch.rand(9), torch.randn(9), torch.rand(9)

    def loss(at: torch.Tensor) -> torch.Tensor:
        return 0.5 * (h * at.square()).sum() + (b * at).sum()

    found = taylor(c, h * c + b, h)
    for index in range(9):
        without = c.clone()
        without[index] = 0
        assert float(found[index]) == pytest.approx(float(loss(without) - loss(c)), abs=1e-6)


def test_curvature_is_the_diagonal_of_the_hessian() -> None:
    A = torch.randn(6, 6, dtype=torch.float64)
    A = A @ A.T
    c = {"one": torch.rand(4, dtype=torch.float64) + 1, "two": torch.rand(2, dtype=torch.float64) + 1}

    def gradients(at: Any) -> dict[str, torch.Tensor]:
        g = A @ torch.cat((at["one"], at["two"]))
        return {"one": g[:4], "two": g[4:]}

    diagonal = A.diag()
    exact = curvature(c, lambda at: {"one": diagonal[:4] * at["one"], "two": diagonal[4:] * at["two"]}, 1, 0.1,
                      torch.Generator().manual_seed(0))  # fmt: skip
    torch.testing.assert_close(torch.cat((exact["one"], exact["two"])), diagonal)
    mean = curvature(c, gradients, 5_000, 0.1, torch.Generator().manual_seed(0))
    torch.testing.assert_close(torch.cat((mean["one"], mean["two"])), diagonal, rtol=0.15, atol=0.3)


def test_fisher_is_half_the_mean_of_the_squared_first_order_change() -> None:
    c, gradients = torch.rand(5), torch.randn(100, 5)
    expected = 0.5 * (gradients * c).square().mean(0)
    torch.testing.assert_close(fisher(c, gradients.square().mean(0)), expected)


def test_gradients_at_other_coefficients_leave_the_model_as_it_is() -> None:
    layer = layer_of(6, 5, new=1)
    model = nn.Sequential(layer)
    layer.U_new.requires_grad_(False)
    x = torch.randn(7, 5)
    losses = (lambda m: m(x[:4]).square().mean(), lambda m: m(x[4:]).square().mean())
    prune = prune_of(layer, model, losses, "bsi")
    before, wanted = layer.w.detach().clone(), [p.requires_grad for p in model.parameters()]
    other = layer.coefficients * 1.1
    found = prune.gradients_at({"0": other}, losses)["0"]
    assert torch.equal(layer.w, before)
    assert [p.requires_grad for p in model.parameters()] == wanted
    for index in range(len(other)):
        step = torch.zeros_like(other)
        step[index] = 1e-3
        values = []
        for at in (other + step, other - step):
            with torch.no_grad():
                layer.w.copy_(at.sqrt())
                values.append(sum(float(loss(model)) for loss in losses) / 2)
                layer.w.copy_(before)
        assert float(found[index]) == pytest.approx((values[0] - values[1]) / 2e-3, rel=2e-2, abs=1e-3)


def test_importance_is_what_the_loss_changes_by_where_the_loss_is_quadratic() -> None:
    # Of a layer whose outputs are compared with zero over orthogonal inputs the loss is quadratic and diagonal in c.
    layer = BasisLinear(torch.randn(6, 5), None, 0, torch.float32)
    model = nn.Sequential(layer)

    def loss(m: nn.Module) -> torch.Tensor:
        return m(torch.eye(5)).square().sum()

    found = prune_of(layer, model, (loss,), "bsi").importances()["0"]
    with torch.no_grad():
        whole = float(loss(model))
        for index in range(5):
            mask = torch.arange(5) != index
            kept = BasisLinear(layer.effective_weight(), None, 0, torch.float32)
            order = kept.coefficients.argsort(descending=True)
            assert torch.allclose(kept.coefficients[order], layer.coefficients, rtol=1e-4)
            kept.keep_(mask)
            change = float(loss(nn.Sequential(kept))) - whole
            assert float(found[index]) == pytest.approx(change, rel=1e-2)


@pytest.mark.parametrize("importance", ["fisher", "bsi"])
@pytest.mark.parametrize("more", [{"relearn": False}, {"keeping_epochs": 0.0}])
def test_importances_know_something_from_the_first_step_and_without_learning(
    dense: Any, tmp_path: Path, text_file: Path, importance: str, more: dict[str, Any]
) -> None:
    options = {"importance": importance, "keep": 0.6, "new": 1, "post_epochs": 0.0, **more}
    made = tune(asked(dense("llama"), tmp_path / "out", text_file, options))
    ranks = [site.decision.rank for site in made.manifest.plan.sites if isinstance(site.decision, LowRank)]
    assert len(set(ranks)) > 2
    assert 0.45 < made.manifest.plan.achieved_keep <= 0.6


def prune_of(layer: BasisLinear, model: nn.Module, losses: Any, importance: str) -> Prune:
    return Prune({"0": layer}, {}, (), 1.0, None, importance, 1, losses, model)


# The layer.


@pytest.mark.parametrize("tokens", [1, 3, 200])
def test_at_first_a_layer_is_the_weight_it_was_made_of(tokens: int) -> None:
    weight, bias, x = torch.randn(12, 8), torch.randn(12), torch.randn(tokens, 8)
    layer = BasisLinear(weight, bias, 4, torch.float32)
    torch.testing.assert_close(layer.effective_weight(), weight, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(layer(x), nn.functional.linear(x, weight, bias), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("m", "n"), [(12, 8), (8, 12), (9, 9)])
def test_bases_of_outputs_sum_to_the_weight_and_their_best_are_those_of_svd_llm(m: int, n: int) -> None:
    weight, inputs = torch.randn(m, n), torch.randn(50, n) * torch.arange(1, n + 1)
    gram = inputs.double().T @ inputs.double()
    U, c, V = bases_of_outputs(weight, gram)
    torch.testing.assert_close((U * c) @ V, weight.double())
    assert torch.equal(c, c.sort(descending=True).values)
    assert float(c.mean()) == pytest.approx(float(torch.linalg.svdvals(weight.double()).mean()))
    for rank in (1, 3, 6):
        kept = (U[:, :rank] * c[:rank]) @ V[:rank]
        factors = whitening.decompose(weight, gram).factors(rank)
        torch.testing.assert_close(kept, factors.up @ factors.down)
        plain = bases_of_weight(weight)
        other = (plain.U_OR[:, :rank] * plain.c_R[:rank]) @ plain.V_RN[:rank]
        lost = [float((inputs.double() @ (weight.double() - one).T).norm()) for one in (kept, other)]
        assert lost[0] < lost[1]
    layer = BasisLinear(weight, None, 0, torch.float32, bases=bases_of_outputs(weight, gram))
    x = torch.randn(4, n)
    torch.testing.assert_close(layer(x), x @ weight.T, rtol=1e-4, atol=1e-4)


def test_bases_in_bfloat16_round_the_weight_a_little() -> None:
    weight = torch.randn(64, 48)
    layer = BasisLinear(weight, None, 4, torch.bfloat16)
    error = float((layer.effective_weight() - weight).norm() / weight.norm())
    assert 1e-4 < error < 1e-2


@pytest.mark.parametrize("tokens", [2, 300])
def test_both_orders_of_products_are_one_function(tokens: int) -> None:
    layer = layer_of(12, 8)
    layer.keep_(torch.arange(8) % 2 == 0)
    nn.init.normal_(layer.U_new)
    x = torch.randn(tokens, 8)
    torch.testing.assert_close(layer(x), x @ layer.effective_weight().T + layer.bias, rtol=1e-4, atol=1e-4)


def test_under_autocast_the_weight_is_rounded_once() -> None:
    weight, x = torch.randn(64, 48), torch.randn(500, 48)
    layer = BasisLinear(weight, None, 0, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = layer(x), nn.functional.linear(x, weight)
    assert float((found - expected).detach().abs().max()) <= 0.02 * float(expected.abs().max())
    with torch.autocast("cpu", torch.bfloat16):
        assert layer._sum_of_bases().dtype == torch.float32


def test_dropped_bases_are_let_go_of() -> None:
    layer = layer_of(12, 8)
    layer.keep_(torch.arange(8) < 3)
    layer(torch.randn(2, 8))
    assert layer.U.shape == (12, 3)
    assert layer.V.shape == (3, 8)
    layer.keep_(torch.arange(8) < 2)
    assert torch.linalg.matrix_rank(layer.effective_weight()) == 2


def test_bases_are_frozen_and_what_is_learned_has_gradients() -> None:
    layer = layer_of()
    assert not {"U", "V", "left", "mask"} & {name for name, _ in layer.named_parameters()}
    layer(torch.randn(5, 8)).square().sum().backward()
    assert float(layer.w.grad.abs().min()) > 0
    assert float(layer.U_new.grad.abs().max()) > 0
    assert float(layer.V_new.grad.abs().max()) == 0  # as U_new is 0
    nn.init.normal_(layer.U_new)
    layer(torch.randn(5, 8)).square().sum().backward()
    assert float(layer.V_new.grad.abs().max()) > 0


@pytest.mark.parametrize("tokens", [2, 300])
def test_a_dropped_basis_has_no_gradient_and_does_not_come_back(tokens: int) -> None:
    layer = layer_of()
    layer.keep_(torch.arange(8) != 3)
    layer.keep_(torch.ones(8, dtype=torch.bool))
    assert layer.mask.tolist() == [True] * 3 + [False] + [True] * 4
    layer(torch.randn(tokens, 8)).square().sum().backward()
    assert float(layer.w.grad[3]) == 0


def test_a_mask_that_was_put_back_from_a_file_is_seen() -> None:
    layer = layer_of()
    x = torch.randn(3, 8)
    layer(x)
    layer.mask.copy_(torch.arange(8) < 2)
    torch.testing.assert_close(layer(x), x @ layer.effective_weight().T + layer.bias, rtol=1e-4, atol=1e-4)


# From bases to factors.


@FAMILIES
def test_a_model_of_bases_answers_as_before_and_its_factors_as_the_model_of_bases(family: str) -> None:
    model = TINY_MODELS[family]()
    ids = torch.randint(3, 64, (2, 9))
    with torch.no_grad():
        dense = model(ids).logits
    classes = {}
    for name in covered(model, ""):
        old = model.get_submodule(name)
        classes[name] = type(old)
        new = BasisLinear(weight_of(old), bias_of(old), 2, torch.float32)
        replace_module(model, name, new)
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, dense, rtol=1e-3, atol=1e-3)
        for name in classes:
            layer = model.get_submodule(name)
            nn.init.normal_(layer.U_new, std=0.05)
            layer.keep_(keep_by_cumulative(layer.coefficients, 0.6))
        bases = model(ids).logits
        ranks = {name: model.get_submodule(name).rank for name in classes}
        decisions = {name: put_back(model, name, kind) for name, kind in classes.items()}
        torch.testing.assert_close(model(ids).logits, bases, rtol=1e-3, atol=1e-3)
    assert any(isinstance(decision, LowRank) for decision in decisions.values())
    for name, decision in decisions.items():
        if isinstance(decision, LowRank):
            assert decision.rank <= ranks[name]
            assert isinstance(model.get_submodule(name), LowRankLinear)
        else:
            assert type(model.get_submodule(name)) is classes[name]


def test_a_weight_that_would_grow_stays_of_its_class() -> None:
    model = nn.ModuleDict({"one": BasisLinear(torch.randn(8, 8), torch.randn(8), 2, torch.float32)})
    decision = put_back(model, "one", Conv1D)
    assert decision.kind == "dense"
    assert isinstance(model["one"], Conv1D)


def test_all_singular_values_go_to_the_factor_of_the_inputs() -> None:
    layer = layer_of(12, 8, new=0)
    layer.keep_(torch.arange(8) < 3)
    down, up = factors_of(layer)
    assert down.shape == (3, 8)
    torch.testing.assert_close(up.T @ up, torch.eye(3, dtype=up.dtype), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close((up @ down).float(), layer.effective_weight(), rtol=1e-4, atol=1e-4)


# The whole of it.

Dense = Callable[[str], Path]


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Dense:
    place = tmp_path_factory.mktemp("basel")

    def of(family: str) -> Path:
        folder = place / family
        if not folder.exists():
            TINY_MODELS[family]().save_pretrained(folder)
            tokenizer.save_pretrained(folder)
        return folder

    return of


def asked(
    folder: Path, out: Path, text_file: Path, options: dict[str, Any] | None = None, **more: Any
) -> TrainingConfig:
    few = {"prunes": 5, "new": 2, "keeping_epochs": 1.0, "pruning_epochs": 1.0, "post_epochs": 1.0, "keep_ratio": 0.4}
    evaluation = {"text": f"file:{text_file}", "length": 16, "windows": 4}
    return TrainingConfig.of({
        "model": str(folder), "out": str(out), "method": "basel", "data": [f"file:{text_file}"], "length": 16,
        "validation": 4, "batch": 4, "tokens": 4 * 16 * 24, "learning_rate": 1e-3, "evaluation": evaluation,
        "options": {**few, **(options or {})}, **more,
    })  # fmt: skip


@FAMILIES
def test_basel_makes_a_smaller_folder_that_answers(dense: Dense, tmp_path: Path, text_file: Path, family: str) -> None:
    made = tune(asked(dense(family), tmp_path / "out", text_file))
    assert verify(tmp_path / "out") <= 1e-6
    plan = made.manifest.plan
    assert plan.achieved_keep < 1
    model = load(tmp_path / "out")
    assert sum(p.numel() for p in {id(p): p for p in model.parameters()}.values()) == plan.after.model_parameters
    assert [stage["steps"] for stage in made.manifest.training[-1].stages] == [16, 8]
    assert made.manifest.perplexity_before is not None
    assert made.manifest.perplexity_after == made.manifest.training[-1].perplexity_after
    was = load(dense(family)).config.tie_word_embeddings
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert tied == was


@pytest.mark.parametrize("importance", ["magnitude", "fisher", "bsi"])
def test_a_size_in_numbers_is_met_with_every_importance(
    dense: Dense, tmp_path: Path, text_file: Path, importance: str
) -> None:
    options = {"keep": 0.6, "importance": importance, "new": 1, "post_epochs": 0.0}
    made = tune(asked(dense("llama"), tmp_path / "out", text_file, options))
    assert 0.45 < made.manifest.plan.achieved_keep <= 0.6


def test_bases_of_outputs_lose_less_on_the_task_before_anything_is_learned(
    dense: Dense, tmp_path: Path, text_file: Path
) -> None:
    losses = {}
    for basis in ("weight", "outputs"):
        options = {"basis": basis, "keep": 0.5, "relearn": False, "post_epochs": 0.0}
        made = tune(asked(dense("llama"), tmp_path / basis, text_file, learning_rate=1e-9, options=options))
        losses[basis] = made.manifest.training[-1].stages[0]["validation"][-1][1]
    assert losses["outputs"] < losses["weight"]


def test_what_was_reached_is_in_the_manifest_and_told(dense: Dense, tmp_path: Path, text_file: Path) -> None:
    notes: list[str] = []

    class Listening(Silent):
        def note(self, message: str) -> None:
            notes.append(message)

    options = {"keep_ratio": 0.02, "prunes": 100, "post_epochs": 0.0}
    made = tune(asked(dense("llama"), tmp_path / "out", text_file, options), progress=Listening())
    (stage,) = made.manifest.training[-1].stages
    reached, plan = stage["reached"], made.manifest.plan
    assert reached["mass_asked"] == 0.02
    assert 0.02 <= reached["mass_left"] <= reached["mass_left_most"] <= 1
    assert reached["parameters"] == plan.after.covered_parameters
    assert reached["parameters_before"] == plan.before.covered_parameters
    assert stage["notes"]
    assert stage["notes"][0] in notes
    assert "keep_ratio 0.02 is missed in" in stage["notes"][0]


def test_a_penalty_in_place_of_importance_leaves_fewer_bases_for_the_same_mass(
    dense: Dense, tmp_path: Path, text_file: Path
) -> None:
    left = []
    for weight in (1e-6, 30.0):
        options = {"l1": weight, "post_epochs": 0.0, "new": 0, "keep_ratio": 0.7, "keeping_epochs": 0.0,
                   "coefficient_rate": 60.0}  # fmt: skip
        made = tune(asked(dense("llama"), tmp_path / f"{weight:g}", text_file, options, tokens=4 * 16 * 16))
        (stage,) = made.manifest.training[-1].stages
        assert 0.7 <= stage["reached"]["mass_left"] < 0.85
        left.append(stage["reached"]["bases_left"])
        assert verify(tmp_path / f"{weight:g}") <= 1e-6
    assert left[1] < 0.9 * left[0]


def test_without_learning_anew_what_stays_is_a_prefix_of_the_spectrum(
    dense: Dense, tmp_path: Path, text_file: Path
) -> None:
    options = {"relearn": False, "new": 0, "bases": "float32", "post_epochs": 0.0}
    made = tune(asked(dense("llama"), tmp_path / "out", text_file, options, learning_rate=1e-12))
    before, after = load(dense("llama")), load(tmp_path / "out")
    assert any(isinstance(site.decision, LowRank) for site in made.manifest.plan.sites)
    for site in made.manifest.plan.sites:
        W, new = weight_of(before.get_submodule(site.name)), after.get_submodule(site.name)
        if isinstance(site.decision, LowRank):
            U, s, V = torch.linalg.svd(W.double(), full_matrices=False)
            k = site.decision.rank
            best = (U[:, :k] * s[:k]) @ V[:k]
            torch.testing.assert_close((new.up.weight @ new.down.weight).double(), best, rtol=1e-3, atol=1e-4)


def test_coefficients_may_learn_faster_than_the_rest(dense: Dense, tmp_path: Path, text_file: Path) -> None:
    options = {"new": 0, "keep_ratio": 1.0, "post_epochs": 0.0, "bases": "float32"}
    moved = []
    for times in (1.0, 10.0):
        out = tmp_path / f"{times:g}"
        tune(asked(dense("llama"), out, text_file, {**options, "coefficient_rate": times}, tokens=64 * 40))
        name = "model.layers.0.mlp.down_proj"
        before, after = load(dense("llama")).get_submodule(name), load(out).get_submodule(name)
        moved.append(float((after.weight - before.weight).detach().norm()))
        norm = "model.layers.0.input_layernorm.weight"
        norms = [load(folder).get_parameter(norm).detach() for folder in (out, dense("llama"))]
        moved.append(float((norms[0] - norms[1]).norm()))
    assert moved[2] > 5 * moved[0]
    assert moved[3] == pytest.approx(moved[1], rel=0.5)


def test_patience_does_not_undo_the_compression(dense: Dense, tmp_path: Path, text_file: Path) -> None:
    plain = tune(asked(dense("llama"), tmp_path / "plain", text_file, learning_rate=1e-2))
    options = {"learning_rate": 1e-2, "evaluate_every": 1, "patience": 1}
    patient = tune(asked(dense("llama"), tmp_path / "patient", text_file, **options))
    assert patient.manifest.training[-1].stages[0]["steps"] == 16
    assert patient.manifest.plan.sites == plain.manifest.plan.sites


def test_a_dense_model_trained_in_place_is_another_parent(dense: Dense, tmp_path: Path) -> None:
    import shutil

    from pared.entrypoints.training.parent import parent_of

    shutil.copytree(dense("llama"), tmp_path / "m")
    tuning = TrainingConfig.of({"model": str(tmp_path / "m"), "method": "basel"})
    before = parent_of(tuning, {}, True).digest
    assert parent_of(tuning, {}, True).digest == before
    model = load(tmp_path / "m")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.mul_(1.01)
    model.save_pretrained(tmp_path / "m")
    assert parent_of(tuning, {}, True).digest != before


def test_layers_to_skip_stay_dense(dense: Dense, tmp_path: Path, text_file: Path) -> None:
    made = tune(asked(dense("llama"), tmp_path / "out", text_file, {"skip": "*mlp*"}))
    low = {site.name for site in made.manifest.plan.sites if isinstance(site.decision, LowRank)}
    assert low
    assert not any("mlp" in name for name in low)


@pytest.mark.parametrize(
    "options", [{}, {"keep": 0.6, "importance": "fisher", "new": 1}, {"basis": "outputs", "l1": 0.1}]
)
def test_one_zero_weight_does_not_end_the_training(
    dense: Dense, tmp_path: Path, text_file: Path, tokenizer: PreTrainedTokenizerFast, options: dict[str, Any]
) -> None:
    """It has no basis: the first prune ended with an IndexError, and the penalty was 0 / 0."""
    model, name = load(dense("llama")), "model.layers.1.self_attn.o_proj"
    nn.init.zeros_(model.get_submodule(name).weight)
    model.save_pretrained(tmp_path / "zero")
    tokenizer.save_pretrained(tmp_path / "zero")
    few = {"post_epochs": 0.0, "pruning_epochs": 0.5, "keeping_epochs": 0.5, **options}
    made = tune(asked(tmp_path / "zero", tmp_path / "out", text_file, few, tokens=4 * 16 * 8, evaluation=None))
    (stage,) = made.manifest.training[-1].stages
    assert all(math.isfinite(loss) for loss in stage["loss"])
    assert f"the weight of {name} is zero" in stage["notes"][-1]
    low = {site.name for site in made.manifest.plan.sites if isinstance(site.decision, LowRank)}
    assert low
    assert name not in low


def test_a_model_of_zero_weights_alone_is_refused(
    dense: Dense, tmp_path: Path, text_file: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    model = load(dense("llama"))
    for name in covered(model, ""):
        nn.init.zeros_(model.get_submodule(name).weight)
    model.save_pretrained(tmp_path / "zero")
    tokenizer.save_pretrained(tmp_path / "zero")
    with pytest.raises(ParedError, match="weights of all 21 target layers are zero"):
        tune(asked(tmp_path / "zero", tmp_path / "out", text_file, evaluation=None))


@pytest.mark.parametrize(("phase", "importance"), quick_first([("factors", "magnitude")], [("bases", "bsi")]))
def test_a_kill_in_any_phase_ends_in_the_same_model(
    dense: Dense, tmp_path: Path, text_file: Path, phase: str, importance: str
) -> None:
    tune(asked(dense("llama"), tmp_path / "whole", text_file, {"importance": importance}, checkpoint_every=3))
    command = ["tune", str(dense("llama")), "--out", str(tmp_path / "killed"), "--method", "basel",
               "--data", f"file:{text_file}", "--length", "16", "--validation", "4", "--batch", "4",
               "--tokens", str(4 * 16 * 24), "--learning-rate", "0.001", "--checkpoint-every", "3",
               "--eval", f"file:{text_file}", "--eval-length", "16", "--eval-windows", "4"]  # fmt: skip
    options = {"prunes": 5, "new": 2, "keeping_epochs": 1.0, "pruning_epochs": 1.0, "post_epochs": 1.0,
               "keep_ratio": 0.4, "importance": importance}  # fmt: skip
    command += [word for name, value in options.items() for word in ("--option", f"{name}={value}")]
    work = tmp_path / ".killed.training"
    number = 1 if phase == "bases" else 2
    past = 10 if phase == "bases" else 1  # of the 8 steps of keeping none changes a mask
    kill_when(
        command,
        lambda: any(
            int(mark.parent.name.removeprefix("checkpoint-")) >= past
            for mark in (work / f"state-{number}").glob("checkpoint-*/WHOLE")
        ),
    )
    assert not (tmp_path / "killed").exists()
    result = CliRunner().invoke(app, [*command, "--resume"])
    assert result.exit_code == 0, result.output
    killed, whole = load(tmp_path / "killed").state_dict(), load(tmp_path / "whole").state_dict()
    assert all(torch.equal(killed[name], whole[name]) for name in whole)
    plans = [Manifest.read(tmp_path / name).plan for name in ("killed", "whole")]
    assert plans[0] == plans[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"importance": "size"}, "option importance: expected one of magnitude, fisher, bsi, got 'size'"),
        ({"keep_ratio": 0.0}, "option keep_ratio: expected a fraction, above 0 and at most 1, got 0.0"),
        ({"keep": 1.5}, "option keep: expected a fraction"),
        ({"l1": -1.0}, "option l1: expected 0 for none, or the weight of the penalty, got -1.0"),
        ({"l1": 1.0, "importance": "bsi"}, "goes with importance=magnitude and relearn=true alone"),
        ({"pruning_epochs": 0.0}, "option pruning_epochs: expected more than 0"),
        ({"keep": 0.05, "new": 8}, "the new bases of all weights are"),
        ({"skip": "*"}, "leave no site"),
        ({"bases": "int8"}, "option bases: expected one of bfloat16, float32"),
    ],
)
def test_what_cannot_be_is_refused(
    dense: Dense, tmp_path: Path, text_file: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ParedError) as error:
        tune(asked(dense("llama"), tmp_path / "out", text_file, options))
    assert message in str(error.value)
    assert not (tmp_path / "out").exists()


def test_a_compressed_folder_is_refused(dense: Dense, tmp_path: Path, text_file: Path) -> None:
    tune(asked(dense("llama"), tmp_path / "one", text_file, {"post_epochs": 0.0}))
    with pytest.raises(ParedError, match="is already compressed by pared"):
        tune(asked(tmp_path / "one", tmp_path / "two", text_file))


def test_a_text_too_short_to_keep_a_part_apart_is_trained_on_whole(
    dense: Dense, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Regression: training stopped where compressing takes all of the text, and measures nothing."""
    (tmp_path / "short.txt").write_text("\n".join(["w5 w6 w7 w8"] * 5))
    tuning = asked(dense("llama"), tmp_path / "out", tmp_path / "short.txt", length=18, validation=0, evaluation={})
    made = tune(tuning)
    (training,) = made.manifest.training
    assert [row["trained_on"] for row in training.data] == [1]
    assert training.evaluation is None
    assert "too short to keep a part apart" in caplog.text
