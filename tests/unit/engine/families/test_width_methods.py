"""Methods that take out channels and heads by scores of their own: FLAP, LLM-Pruner and Wanda-sp in a compression."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import TINY_MODELS
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

import pared
from pared import ParedError
from pared.data.windows import Windows, digest_of
from pared.entrypoints.plan import plan_of
from pared.lowrank import LowRankMethod
from pared.methods import METHODS as REGISTRY
from pared.schema.options import Options
from pared.schema.plan import Dense
from pared.schema.width import Width, channels_of
from pared.structure import bias_of, weight_of
from pared.widths import in_order_of
from pared.widths.registry import METHODS as DECLARED

METHODS = {name: one for name, one in DECLARED.items() if one.widths is not None}  # another takes experts out
TOKENS = torch.randint(1, 64, (8, 24), generator=torch.Generator().manual_seed(3))
WINDOWS = Windows(TOKENS, digest_of(TOKENS), "words", "a test", stand_in=True)


SLOW = pytest.mark.slow


def compressed(model: str | PreTrainedModel, method: str, **fields: Any) -> Any:
    model = TINY_MODELS[model]() if isinstance(model, str) else model
    asked = {"keep": 0.7, "multiple_of": 4, "windows": WINDOWS, "evaluation": None}
    return pared.compress(model, None, method=method, **{**asked, **fields})


def readers(result: Any) -> dict[str, Width]:
    """Return the decisions of the layers that read channels or heads, of which some are gone."""
    decided = {site.name: site.decision for site in result.plan.sites}
    return {name: one for name, one in decided.items() if isinstance(one, Width) and one.side == "in"}


@torch.no_grad()
def seen_by(model: PreTrainedModel, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what a layer reads and what it outputs."""
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    handle = model.get_submodule(name).register_forward_hook(
        lambda _, args, out: seen.append((args[0].flatten(0, -2).double(), out.flatten(0, -2).double()))
    )
    model(TOKENS)
    handle.remove()
    return seen[0]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", ["llama", *(pytest.param(one, marks=SLOW) for one in ("gpt2", "opt", "phi3"))])
def test_the_plan_counts_what_there_is(family: str, method: str):
    before = sum(parameter.numel() for parameter in TINY_MODELS[family]().parameters())
    result = compressed(family, method)
    assert result.plan.before.model_parameters == before
    assert result.plan.after.model_parameters == sum(one.numel() for one in result.model.parameters())
    assert result.plan.achieved_keep <= 0.7
    assert all(isinstance(site.decision, Width | Dense) for site in result.plan.sites)
    if method != "flap":  # whose threshold may find none to take out
        found = any(one.unit == "head" for one in readers(result).values())
        assert found == (family != "phi3" and METHODS[method].heads)
    assert result.model(TOKENS).logits.isfinite().all()


@pytest.mark.parametrize("unit", ["channel", "head"])
@pytest.mark.parametrize("family", ["llama", "opt"])
def test_flap_leaves_the_mean_output_of_the_first_layer_as_it_was(family: str, unit: str):
    """Of the first layer that reads channels, whose inputs are those of the dense model; with a bias and without.

    Regression for heads: that several inputs of ``o`` go with each, and their means with all of them, was not tried.
    """
    dense = TINY_MODELS[family]()
    # One threshold may find no head to take out; one number everywhere takes some.
    asked = {"heads": "off"} if unit == "channel" else {"heads": "on", "allocation": "uniform", "keep": 0.6}
    result = compressed(family, "flap", **asked)
    name, decision = next(iter(readers(result).items()))
    assert decision.unit == unit
    inputs = dense.get_submodule(name).in_features // decision.channels
    assert (inputs > 1) == (unit == "head")
    assert decision.adds_bias == (bias_of(dense.get_submodule(name)) is None)
    x_TN, y_TO = seen_by(dense, name)
    channels, layer = channels_of(decision.kept or ""), result.model.get_submodule(name)
    kept = [channel * inputs + place for channel in channels for place in range(inputs)]
    assert 0 < len(kept) < x_TN.shape[1]
    bias_O = bias_of(layer)
    assert bias_O is not None
    assert torch.equal(weight_of(layer), weight_of(dense.get_submodule(name))[:, kept])
    narrow_TO = x_TN[:, kept] @ weight_of(layer).detach().double().T + bias_O.detach().double()
    assert not torch.allclose(narrow_TO, y_TO, atol=1e-3)
    assert torch.allclose(narrow_TO.mean(dim=0), y_TO.mean(dim=0), atol=1e-6)


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3"])
def test_llm_pruner_keeps_what_a_direct_computation_does(family: str):
    """The gradient of the text's loss through every weight of a channel, by autograd over the whole model."""
    model = TINY_MODELS[family]()
    model.requires_grad_(True)
    model(TOKENS, labels=TOKENS).loss.backward()
    salience = {
        name: (one.weight * one.weight.grad).abs().detach().double()
        for name, one in model.named_modules()
        if getattr(getattr(one, "weight", None), "grad", None) is not None and one.weight.ndim == 2
    }
    result = compressed(family, "llm-pruner", heads="off")
    assert readers(result)
    for name, decision in readers(result).items():
        group = [site for site in result.plan.sites if isinstance(site.decision, Width) and site.decision.group == name]
        scores_G = torch.zeros(decision.channels, dtype=torch.float64)
        for site in group:
            values = salience[site.name].T if family == "gpt2" else salience[site.name]
            own = values.sum(dim=0) if site.name == name else values.sum(dim=1).view(-1, decision.channels).sum(dim=0)
            scores_G += own
        best = scores_G.argsort(descending=True)[: decision.width].sort().values
        assert channels_of(decision.kept or "") == best.tolist()


def test_wanda_sp_once_scores_what_the_dense_model_reads():
    once = compressed("llama", "wanda-sp", statistics="once")
    last = list(readers(once))[-1]
    x_TN, _ = seen_by(TINY_MODELS["llama"](), last)
    scores_G = weight_of(TINY_MODELS["llama"]().get_submodule(last)).detach().double().abs().mean(0) * x_TN.norm(dim=0)
    kept = scores_G.argsort(descending=True)[: readers(once)[last].width].sort().values.tolist()
    assert channels_of(readers(once)[last].kept or "") == kept


def test_wanda_sp_scores_behind_the_blocks_that_are_pruned():
    """What every layer reads behind the pruned blocks before its own, by a model put together of them and the rest."""
    result, other = (compressed("llama", "wanda-sp", statistics=when) for when in ("auto", "once"))
    mixed, changed = TINY_MODELS["llama"](), list[str]()
    for index in range(len(mixed.model.layers)):
        for name, decision in readers(result).items():
            if not name.startswith(f"model.layers.{index}."):
                continue
            x_TN, _ = seen_by(mixed, name)
            scores_N = weight_of(mixed.get_submodule(name)).detach().double().abs().mean(dim=0) * x_TN.norm(dim=0)
            scores_G = scores_N.view(decision.channels, -1).sum(dim=1)
            kept = scores_G.argsort(descending=True)[: decision.width].sort().values.tolist()
            assert channels_of(decision.kept or "") == kept, name
            changed += [name] if readers(other)[name].kept != decision.kept else []
        mixed.model.layers[index] = result.model.model.layers[index]
    assert changed, "statistics of the dense model keep the same channels everywhere, so that nothing was told"


@pytest.mark.parametrize("method", METHODS)
def test_channels_that_nothing_reads_or_makes_go_and_change_nothing(method: str):
    model = TINY_MODELS["llama"]()
    for layer in model.model.layers:
        layer.mlp.down_proj.weight.data[:, ::2] = 0
        layer.mlp.gate_proj.weight.data[::2] = layer.mlp.up_proj.weight.data[::2] = 0
    dense = model(TOKENS).logits.detach()
    keep = 1 - 3 * 24 * 32 / (3 * 48 * 32 + 2 * 32 * 32 + 2 * 16 * 32)
    result = compressed(model, method, keep=keep + 1e-9, heads="off", allocation="uniform")
    assert [one.width for one in readers(result).values()] == [24, 24, 24]
    assert torch.allclose(result.model(TOKENS).logits, dense, atol=1e-6)


@pytest.mark.parametrize(
    ("family", "method", "stream"),
    [("llama", "flap", "on"), pytest.param("llama", "flap", "off", marks=SLOW),
     *(pytest.param(family, method, stream, marks=SLOW) for stream in ("off", "on")
       for family, method in (("gpt2", "flap"), ("opt", "llm-pruner"), ("llama", "wanda-sp")))],
)  # fmt: skip
def test_a_folder_loads_and_answers_as_the_model_did(
    family: str,
    method: str,
    stream: str,
    tokenizer: PreTrainedTokenizerFast,
    calibration: pared.Calibration,
    tmp_path: Path,
):
    TINY_MODELS[family]().save_pretrained(tmp_path / "dense")
    tokenizer.save_pretrained(tmp_path / "dense")
    recipe = pared.Recipe(model=str(tmp_path / "dense"), out=str(tmp_path / "small"), method=method, keep=0.7,
                          multiple_of=4, calibration=calibration, evaluation=None, stream=stream)  # fmt: skip
    outcome = pared.run(recipe)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    assert sum(one.numel() for one in loaded.parameters()) == outcome.manifest.plan.after.model_parameters
    assert pared.verify(tmp_path / "small") == 0
    again = pared.compress(TINY_MODELS[family](), tokenizer, recipe.model_copy(update={"out": None, "model": None}))
    assert torch.equal(loaded(TOKENS).logits, again.model(TOKENS).logits)
    loaded.save_pretrained(tmp_path / "again")
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / "again")(TOKENS).logits, loaded(TOKENS).logits)
    entries = json.loads((tmp_path / "small" / "config.json").read_text()).get("quantization_config", {"modules": {}})
    added = [name for name, one in entries["modules"].items() if one["bias"] and "down_proj" in name]
    assert bool(added) == (method == "flap" and family == "llama")


@pytest.mark.parametrize("method", ["llm-pruner", "wanda-sp"])
def test_uniform_widths_are_a_plain_folder_of_the_architecture(
    method: str, tokenizer: PreTrainedTokenizerFast, calibration: pared.Calibration, tmp_path: Path
):
    result = pared.compress(TINY_MODELS["llama"](), tokenizer, method=method, keep=0.7, multiple_of=4,
                            calibration=calibration, evaluation=None)  # fmt: skip
    result.save(tmp_path / "small")
    config = json.loads((tmp_path / "small" / "config.json").read_text())
    assert not {"quantization_config", "auto_map"} & config.keys()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    assert torch.allclose(loaded(TOKENS).logits, result.model(TOKENS).logits, atol=1e-5)


def test_a_bias_that_the_architecture_does_not_have_is_told_where_plain_weights_are_asked_for(
    tokenizer: PreTrainedTokenizerFast, calibration: pared.Calibration, tmp_path: Path
):
    result = pared.compress(TINY_MODELS["llama"](), tokenizer, method="flap", keep=0.7, multiple_of=4,
                            calibration=calibration, evaluation=None)  # fmt: skip
    result.save(tmp_path / "small")
    with pytest.raises(ParedError, match=r"mlp\.down_proj has a bias, which LlamaForCausalLM has no place for"):
        pared.export(tmp_path / "small", tmp_path / "plain")
    assert not (tmp_path / "plain").exists()


class _Routed(nn.Module):
    """Sends every token to one of two MLPs."""

    def __init__(self, mlps: list[nn.Module]) -> None:
        super().__init__()
        self.mlps = nn.ModuleList(mlps)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        flat = x.reshape(-1, x.shape[-1])
        first, out = flat[:, 0] > 0, torch.zeros_like(flat)
        for mlp, rows in zip(self.mlps, (first, ~first), strict=True):
            if bool(rows.any()):
                out[rows] = mlp(flat[rows])
        return out.view_as(x)


@pytest.mark.parametrize(("method", "allocation"), [("flap", "auto"), ("loss-optimal", "uniform")])
def test_experts_that_no_token_reaches_keep_all_channels(method: str, allocation: str):
    """Regression: one width for all was decided for them too, and nothing was known of their channels."""
    model, other = TINY_MODELS["llama"](), TINY_MODELS["mistral"]()
    for layer, more in zip(model.model.layers, other.model.layers, strict=False):
        layer.mlp = _Routed([layer.mlp, more.mlp])
    tokens = torch.full((4, 24), 5)
    result = compressed(model, method, keep=0.9, allocation=allocation, structures="widths", heads="off",
                        windows=Windows(tokens, digest_of(tokens), "words", "a test", stand_in=True))  # fmt: skip
    whole = [site.name for site in result.plan.sites if isinstance(site.decision, Dense)]
    assert readers(result)
    assert any(name.endswith(("mlps.0.down_proj", "mlps.1.down_proj")) for name in whole)


class _ByNumber(Options):
    """Options of by-number."""


def test_a_method_of_another_package_that_needs_no_text_takes_out_channels():
    """It keeps the channels of the highest numbers."""
    method = LowRankMethod(
        name="by-number", paper="a test", summary="low numbers go", config=_ByNumber, solve=None, heads=True,
        widths=lambda layers, _: in_order_of(torch.arange(layers.W_ON.shape[1]), layers.W_ON, layers.inputs),
        structures=lambda _: "widths",
    )  # fmt: skip
    REGISTRY.register("by-number", method)
    try:
        result = pared.compress(TINY_MODELS["llama"](), None, method="by-number", keep=0.7, multiple_of=4,
                                evaluation=None)  # fmt: skip
    finally:
        REGISTRY.unregister("by-number")
    assert result.calibration is None
    assert {one.unit for one in readers(result).values()} == {"channel", "head"}
    for one in readers(result).values():
        assert channels_of(one.kept or "") == list(range(one.channels - one.width, one.channels))


@pytest.mark.parametrize("structures", ["ranks", "mixed"])
@pytest.mark.parametrize("method", METHODS)
def test_what_lowers_no_rank_is_refused_where_ranks_are_asked_for(method: str, structures: str):
    with pytest.raises(ParedError, match=f"method {method} takes channels out and lowers no rank, got structures "):
        compressed("llama", method, structures=structures)
    with pytest.raises(ParedError, match=f"method {method} takes channels out and lowers no rank"):
        METHODS[method].decompose(torch.ones(3, 4), {})


@pytest.mark.parametrize("method", METHODS)
def test_a_plan_of_ranks_was_made_for_methods_that_lower_none(method: str):
    plan = pared.plan(TINY_MODELS["llama"](), method=method, keep=0.8, multiple_of=4)
    assert all(isinstance(site.decision, Width | Dense) for site in plan.sites)
    assert any(isinstance(site.decision, Width) for site in plan.sites)
    assert plan.achieved_keep <= 0.8
    told = r"keep 0\.2 cannot be reached by widths of 3 channel groups alone"
    with pytest.raises(ParedError, match=told) as refused:
        pared.plan(TINY_MODELS["llama"](), method=method, keep=0.2, multiple_of=4)
    assert ("heads, which can go too, are not known from shapes" in str(refused.value)) == bool(METHODS[method].heads)


def test_a_plan_of_widths_has_the_sizes_of_uniform_ones(tmp_path: Path):
    TINY_MODELS["llama"]().save_pretrained(tmp_path)
    planned = plan_of(pared.Recipe(model=str(tmp_path), method="flap", keep=0.8, multiple_of=4))
    made = compressed("llama", "flap", keep=0.8, heads="off", allocation="uniform").plan
    assert {one.name: one.after for one in planned.plan.sites} == {one.name: one.after for one in made.sites}
    assert any(one.endswith("attentions are left whole, whose heads can go too") for one in planned.remarks())
    assert not any("ranks" in one for one in planned.remarks())


def test_an_allocation_of_widths_alone_is_refused_for_ranks():
    with pytest.raises(ParedError, match="allocation global decides widths alone, got structures ranks"):
        compressed("llama", "loss-optimal", allocation="global", multiple_of=None)


def test_any_widths_can_be_spread_by_one_threshold():
    result = compressed("llama", "loss-optimal", structures="widths", allocation="global", statistics="once")
    assert 0.6 < result.plan.achieved_keep <= 0.7
    assert result.model(TOKENS).logits.isfinite().all()
