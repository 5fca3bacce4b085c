"""One degenerate site never ends a run nor gets an arbitrary answer: it falls back to a stated rule, on record."""

from collections.abc import Callable

import pytest
import torch
from tiers import quick_first
from tiny_models import TINY_MODELS
from transformers import PreTrainedModel, PreTrainedTokenizerFast

import pared
from pared import compress
from pared.allocation import allocators_for
from pared.engine.checks.enough import STARVED
from pared.engine.result import remarks
from pared.lowrank import METHODS
from pared.schema.plan import Dense, LowRank
from pared.sparsity import METHODS as PRUNERS
from pared.sparsity import Unstructured, parse, wanda


def zero_weight(model: PreTrainedModel) -> None:
    model.model.layers[1].self_attn.q_proj.weight.data.zero_()


def zero_value(model: PreTrainedModel) -> None:
    """The output projection reads nothing but zeros, too."""
    model.model.layers[1].self_attn.v_proj.weight.data.zero_()


def zero_block(model: PreTrainedModel) -> None:
    for parameter in model.model.layers[1].parameters():
        parameter.data.zero_()


def zero_input(model: PreTrainedModel) -> None:
    model.model.layers[1].input_layernorm.weight.data.zero_()


def zero_gradient(model: PreTrainedModel) -> None:
    """As block expansion makes."""
    model.model.layers[1].self_attn.o_proj.weight.data.zero_()
    model.model.layers[1].mlp.down_proj.weight.data.zero_()


def constant(model: PreTrainedModel) -> None:
    model.model.layers[1].mlp.gate_proj.weight.data.fill_(0.1)
    model.model.layers[1].self_attn.o_proj.weight.data.fill_(0.1)


def rank_one(model: PreTrainedModel) -> None:
    for weight in (model.model.layers[1].mlp.up_proj.weight, model.model.layers[0].self_attn.k_proj.weight):
        weight.data = torch.outer(torch.linspace(-1, 1, len(weight)), torch.linspace(0.2, 1, weight.shape[1]))


def outlier(model: PreTrainedModel) -> None:
    model.model.layers[0].mlp.up_proj.weight.data[3, 5] = 1e6
    model.model.layers[1].self_attn.q_proj.weight.data[0, 0] = -1e6


def beyond(model: PreTrainedModel) -> None:
    """What this weight costs does not fit float32, though the weight does."""
    model.model.layers[1].mlp.down_proj.weight.data[0, 0] = 1e25


def single_row(model: PreTrainedModel) -> None:
    """The gate of a shared expert is 1 x n as it is."""
    assert model.model.layers[0].mlp.shared_expert_gate.weight.shape == (1, 32)


def everything(model: PreTrainedModel) -> None:
    layers = model.model.layers
    layers[0].self_attn.q_proj.weight.data[1] = 1e4
    layers[0].self_attn.k_proj.weight.data.zero_()
    layers[0].self_attn.v_proj.weight.data.fill_(0.1)
    layers[0].mlp.shared_expert.down_proj.weight.data.zero_()
    layers[1].input_layernorm.weight.data.zero_()
    layers[1].mlp.shared_expert.up_proj.weight.data = torch.outer(torch.linspace(-1, 1, 40), torch.linspace(0.2, 1, 32))


CASES: dict[str, tuple[str, Callable[[PreTrainedModel], None]]] = {
    **{case.__name__: ("mistral", case) for case in
       (zero_weight, zero_value, zero_block, zero_input, zero_gradient, constant, rank_one, outlier, beyond)},
    "single_row": ("qwen2_moe", single_row),
    "everything": ("qwen2_moe", everything),
}  # fmt: skip


@pytest.fixture
def run(
    tokenizer: PreTrainedTokenizerFast, calibration: pared.Calibration
) -> Callable[..., tuple[pared.Compressed, dict[str, torch.Tensor]]]:
    def with_case(case: str, **fields: object) -> tuple[pared.Compressed, dict[str, torch.Tensor]]:
        family, spoil = CASES[case]
        model = TINY_MODELS[family]()
        spoil(model)
        asked = calibration.model_copy(update={"samples": 4, "batch": 4})
        recipe = pared.Recipe.model_validate({"calibration": asked, **fields})
        result = compress(model, tokenizer, recipe)
        return result, {name: tensor.clone() for name, tensor in model.state_dict().items()}

    return with_case


def require_same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert bool(tensor.isfinite().all()), name
        assert torch.equal(tensor, second[name]), name


SOME = ("zero_value", "zero_gradient", "rank_one", "everything")  # what each family of methods stumbled over

OF_RANKS = [name for name, one in allocators_for("low_rank").items() if one.ranks]
LOW_RANK = [
    *((method, "auto", case) for method in METHODS for case in CASES),
    *((method, allocation, "everything") for method in METHODS for allocation in OF_RANKS
      if allocation != "sensitivity"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("method", "allocation", "case"),
    quick_first(
        [(method, "auto", case) for method in ("fwsvd", "svd-llm", "loss-optimal") for case in SOME]
        + [(method, "auto", "everything") for method in METHODS]
        + [("svd-llm", name, "everything") for name in OF_RANKS if name not in ("sensitivity", "swift")],
        LOW_RANK,
    ),
)
def test_a_degenerate_site_never_ends_a_low_rank_run(method: str, allocation: str, case: str, run: Callable) -> None:
    budget = {"rank_fraction": 0.4} if allocation == "rank-fraction" else {"keep": 0.75, "allocation": allocation}
    result, weights = run(case, method=method, **budget)
    if allocation != "rank-fraction":
        assert result.plan.shortfall == 0
    assert result.plan == run(case, method=method, **budget)[0].plan
    assert all(bool(tensor.isfinite().all()) for tensor in weights.values())


PRUNING = [
    *((method, "uniform", case) for method in PRUNERS for case in CASES),
    *(("wanda", allocation, case) for allocation in ("alphapruning", "dsa", "loss", "owl") for case in CASES),
    *((method, allocation, "everything") for method in PRUNERS for allocation in allocators_for("sparse")),
]


@pytest.mark.parametrize(
    ("method", "allocation", "case"),
    quick_first(
        [(method, "uniform", case) for method in PRUNERS for case in SOME]
        + [("wanda", name, "everything") for name in allocators_for("sparse")]
        + [("wanda", name, "zero_block") for name in ("alphapruning", "dsa", "loss")],
        PRUNING,
    ),
)
def test_a_degenerate_site_never_ends_a_pruning(method: str, allocation: str, case: str, run: Callable) -> None:
    fields = {"method": method, "sparsity": 0.5, "allocation": allocation}
    result, weights = run(case, **fields)
    covered = [site for site in result.plan.sites if not isinstance(site.decision, Dense)]
    kept = sum(site.after for site in covered) / sum(site.before for site in covered)
    rounding = sum(site.out_features for site in covered) / sum(site.before for site in covered)
    # What experts would have had that are found too few tokens for only behind the pruned blocks is put nowhere else.
    dense = [site for site in result.plan.sites if isinstance(site.decision, Dense)]
    starved = sum(site.before for site in dense if site.decision.reason.startswith(STARVED))
    rounding += starved / sum(site.before for site in covered) / 2
    assert kept <= 0.5 + rounding
    assert kept >= 0.5 - (rounding if starved else 1e-6)
    require_same(weights, run(case, **fields)[1])


# The rules.


def test_weights_of_dead_inputs_go_by_size_before_all_others() -> None:
    """Regression: where scores are all zero the first weights went, whatever they were."""
    W_ON = torch.tensor([[5.0, -1.0, 3.0, 2.0], [-1.0, 5.0, 1e-30, 2.0]])
    for energy_N, kept in (
        (torch.zeros(4), [[1, 0, 1, 0], [0, 1, 0, 1]]),
        (torch.tensor([0.0, 0.0, 1.0, 0.0]), [[1, 0, 1, 0], [0, 1, 1, 0]]),
        (torch.tensor([0.0, 2.0, 1.0, 0.0]), [[0, 1, 1, 0], [0, 1, 1, 0]]),
    ):
        assert wanda.prune(W_ON, energy_N, Unstructured(0.5)).mask.int().tolist() == kept
        assert wanda.prune(W_ON, energy_N, parse("2:4")).mask.int().tolist() == kept


def test_a_site_that_reads_zeros_is_pruned_by_magnitude_and_on_record(run: Callable) -> None:
    for method in ("wanda", "sparsegpt"):
        result, _ = run("zero_value", method=method, sparsity=0.5)
        name = "model.layers.1.self_attn.o_proj"
        assert "magnitude" in result.fallbacks[name]
        dense, pruned = TINY_MODELS["mistral"]().get_submodule(name).weight, result.model.get_submodule(name).weight
        gone, stays = dense[pruned == 0].detach().abs(), dense[pruned != 0].detach().abs()
        assert len(gone) == 512
        if method == "sparsegpt":
            assert float(gone.max()) <= float(stays.min())
    assert name not in run("zero_value", method="magnitude", sparsity=0.5)[0].fallbacks


@pytest.mark.parametrize("method", ["loss-optimal", "fwsvd"])
def test_what_no_gradient_reaches_is_given_the_least_and_is_on_record(method: str, run: Callable) -> None:
    result, _ = run("zero_gradient", method=method, keep=0.6, allocation="loss")
    of_site = {site.name: site.decision for site in result.plan.sites}
    for name in ("self_attn.q_proj", "self_attn.v_proj", "mlp.gate_proj"):
        decision = of_site[f"model.layers.1.{name}"]
        assert isinstance(decision, LowRank)
        assert decision.rank == 1
        assert "no gradient" in result.fallbacks[f"model.layers.1.{name}"]
    assert "weight is zero" in result.fallbacks["model.layers.1.self_attn.o_proj"]
    assert not any(".layers.0." in name for name in result.fallbacks)


@pytest.mark.parametrize("method", ["svd-llm", "asvd", "loss-optimal"])
def test_what_reads_zeros_costs_nothing_and_is_on_record(method: str, run: Callable) -> None:
    result, _ = run("zero_input", method=method, keep=0.6, allocation="loss")
    ranks = {site.name: site.decision for site in result.plan.sites}
    for name in ("q", "k", "v"):
        assert ranks[f"model.layers.1.self_attn.{name}_proj"].rank == 1
        assert f"model.layers.1.self_attn.{name}_proj" in result.fallbacks


def test_a_spectrum_without_a_tail_is_left_out_of_its_unit(run: Callable) -> None:
    fields = {"method": "magnitude", "sparsity": 0.5, "allocation": "alphapruning"}
    result, _ = run("constant", **fields)
    assert "left out of its unit's mean" in result.fallbacks["model.layers.1.mlp.gate_proj"]
    alone, _ = run("zero_block", **fields)
    assert len(alone.fallbacks) == 7
    assert {site.decision.sparsity for site in alone.plan.sites} == {0.5}  # the block of none is as the others are


def test_a_single_row_stays_dense(run: Callable) -> None:
    for budget in ({"keep": 0.75}, {"rank_fraction": 0.4}):
        result, _ = run("single_row", method="svd", **budget)
        gates = [site for site in result.plan.sites if site.name.endswith("shared_expert_gate")]
        assert all(isinstance(site.decision, Dense) for site in gates)
        assert len(gates) == 2


def test_fallbacks_are_told(run: Callable) -> None:
    result, _ = run("zero_value", method="svd-llm", keep=0.75)
    lines = list(remarks(result.plan, result.fallbacks))
    assert any(
        "2 fallbacks, all in the manifest; the first is model.layers.1.self_attn.v_proj" in line for line in lines
    )
