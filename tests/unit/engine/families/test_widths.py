"""Widths in a compression: sizes, the compensated weight, where statistics come from, and what is refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from passes import UNSHRUNK
from tiers import crossed
from tiny_models import FAMILIES, TINY_MODELS
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

import pared
from pared import ParedError
from pared.data.windows import Windows, digest_of
from pared.engine.spec import resolve
from pared.modules import NarrowConv1D, NarrowLinear
from pared.schema.plan import Dense, LowRank
from pared.schema.width import Width, channels_of
from pared.structure import weight_of

TOKENS = torch.randint(1, 64, (8, 24), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def compressed(tokenizer: PreTrainedTokenizerFast, calibration: pared.Calibration) -> Callable[..., Any]:
    def compress(model: str | PreTrainedModel, **fields: Any) -> Any:
        model = TINY_MODELS[model]() if isinstance(model, str) else model
        asked = {"keep": 0.75, "structures": "mixed", "multiple_of": 4, "statistics": "once", "evaluation": None}
        asked["heads"] = "off"
        return pared.compress(model, tokenizer, calibration=calibration, **{**asked, **fields})

    return compress


def widths(result: Any) -> list[int]:
    decided = [site.decision for site in result.plan.sites]
    return [one.width for one in decided if isinstance(one, Width) and one.side == "in"]


@pytest.mark.parametrize(("family", "structures"), crossed(list(FAMILIES), ["widths", "mixed"]))
def test_the_plan_counts_what_there_is(family: str, structures: str, compressed: Callable[..., Any]):
    if family == "bert":
        pytest.skip("an encoder is calibrated on labelled examples")
    before = sum(parameter.numel() for parameter in TINY_MODELS[family]().parameters())
    result = compressed(family, structures=structures)
    after = sum(parameter.numel() for parameter in result.model.parameters())
    assert result.plan.before.model_parameters == before
    assert result.plan.after.model_parameters == after
    assert result.plan.achieved_keep <= 0.75
    assert widths(result)
    assert all(width % 4 == 0 for width in widths(result))
    for site in result.plan.sites:
        layer = result.model.get_submodule(site.name)
        narrow = isinstance(site.decision, Width)
        ranked = narrow and site.decision.rank is not None
        assert isinstance(layer, NarrowLinear | NarrowConv1D) == (narrow and not ranked)
        if narrow:
            assert sum(one.numel() for name, one in layer.named_parameters() if name.endswith("weight")) == site.after
            assert (site.decision.kept is not None) == (site.decision.side == "in")
    if structures == "widths":
        assert all(isinstance(site.decision, Width | Dense) for site in result.plan.sites)
    assert result.model(TOKENS).logits.isfinite().all()


def inputs_of(model: nn.Module, name: str, tokens: torch.Tensor) -> torch.Tensor:
    """Return the Gram per token of what a layer reads."""
    seen: list[torch.Tensor] = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    with torch.no_grad():
        model(tokens)
    handle.remove()
    x_TN = seen[0].flatten(0, 1).double()
    return x_TN.T @ x_TN / len(x_TN)


def test_what_reads_the_channels_is_the_least_squares_weight(compressed: Callable[..., Any]):
    dense = TINY_MODELS["llama"]()
    windows = Windows(TOKENS, digest_of(TOKENS), "words", "a test", stand_in=True)
    result = compressed("llama", structures="widths", windows=windows, options=UNSHRUNK)
    for site in result.plan.sites:
        if not (isinstance(site.decision, Width) and site.decision.side == "in"):
            continue
        A_NN = inputs_of(dense, site.name, TOKENS)
        A_NN.diagonal().add_(1e-4 * A_NN.diagonal().mean())
        kept = channels_of(site.decision.kept or "")
        gone = [j for j in range(48) if j not in kept]
        W_ON = weight_of(dense.get_submodule(site.name)).detach().double()
        expected = W_ON[:, kept] + W_ON[:, gone] @ A_NN[gone][:, kept] @ torch.linalg.inv(A_NN[kept][:, kept])
        found = weight_of(result.model.get_submodule(site.name)).detach().double()
        assert len(kept) == site.decision.width
        assert (found - expected).norm() < 1e-4 * expected.norm()
        for name in ("gate_proj", "up_proj"):
            whole = dense.get_submodule(f"{site.name.rpartition('.')[0]}.{name}").weight
            narrow = result.model.get_submodule(f"{site.name.rpartition('.')[0]}.{name}").weight
            assert torch.equal(narrow, whole[kept])


def error(model: PreTrainedModel, dense: PreTrainedModel) -> float:
    with torch.no_grad():
        return float((model(TOKENS).logits - dense(TOKENS).logits).square().mean())


def test_channels_are_better_chosen_than_at_random(compressed: Callable[..., Any]):
    dense = TINY_MODELS["llama"]()
    windows = Windows(TOKENS, digest_of(TOKENS), "words", "a test", stand_in=True)
    result = compressed("llama", structures="widths", windows=windows)
    found = error(result.model, dense)
    worse = 0
    for seed in range(5):
        other = TINY_MODELS["llama"]()
        generator = torch.Generator().manual_seed(seed)
        for site in result.plan.sites:
            if isinstance(site.decision, Width) and site.decision.side == "in":
                gone = torch.randperm(48, generator=generator)[site.decision.width :]
                other.get_submodule(site.name).weight.data[:, gone] = 0
        worse += error(other, dense) > found
    assert worse == 5


def test_sequential_statistics_are_those_behind_the_compressed_blocks(compressed: Callable[..., Any]):
    windows = Windows(TOKENS, digest_of(TOKENS), "words", "a test", stand_in=True)
    once, behind = (
        compressed("llama", structures="widths", windows=windows, statistics=when, dense_path=path)
        for when, path in (("once", "auto"), ("sequential", 0.5))
    )
    assert widths(once) == widths(behind)
    first, *_, last = [site.name for site in once.plan.sites if site.kind == "down"]
    same = [torch.equal(*(one.model.get_submodule(name).weight for one in (once, behind))) for name in (first, last)]
    assert not same[1]  # what the last block reads is no longer what it was


def test_uniform_widths_are_one_width(compressed: Callable[..., Any]):
    result = compressed("llama", structures="widths", allocation="uniform")
    assert len(set(widths(result))) == 1
    assert len(widths(result)) == 3
    assert not any(isinstance(site.decision, LowRank) for site in result.plan.sites)


def test_channels_that_nothing_reads_cost_nothing_to_take_out(compressed: Callable[..., Any]):
    model = TINY_MODELS["llama"]()
    for layer in model.model.layers:
        layer.mlp.down_proj.weight.data[:, ::2] = 0
    dense = model(TOKENS).logits.detach()
    keep = 1 - 3 * 24 * 32 / (3 * 48 * 32 + 2 * 32 * 32 + 2 * 16 * 32)
    result = compressed(model, structures="widths", keep=keep + 1e-9)
    assert widths(result) == [24, 24, 24]
    assert torch.allclose(result.model(TOKENS).logits, dense, atol=1e-5)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"method": "svd-llm"},
            "method svd-llm has ranks alone, got structures mixed; those with widths: loss-optimal",
        ),
        ({"allocation": "swift"}, "allocation swift decides ranks alone, got structures mixed; those that decide "),
        ({"refit": "sequential"}, "refit sequential fits factors, got structures mixed"),
        ({"options": {"group_size": 2}}, "structures mixed and bases that blocks share cannot be in one budget"),
        ({"structures": "ranks"}, "multiple_of 4 is of widths, and here ranks are decided"),
        ({"structures": "widths", "keep": 0.2}, "keep 0.2 cannot be reached by widths of 3 channel groups alone"),
        ({"structures": "widths", "skip": ("*.gate_proj",)}, "structures widths: no channels were found that can be"),
        ({"multiple_of": 0}, "multiple_of"),
        ({"structures": "both"}, "structures"),
    ],
)
def test_what_does_not_go_with_widths_is_refused(fields: dict[str, Any], message: str, compressed: Callable[..., Any]):
    with pytest.raises(ParedError) as raised:
        compressed("llama", **fields)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_pruner_takes_no_structures(compressed: Callable[..., Any]):
    with pytest.raises(ParedError, match="method wanda does not take structures"):
        compressed("llama", method="wanda", sparsity=0.5, keep=None, multiple_of=None, statistics="auto")


@pytest.mark.parametrize(("family", "stream"), crossed(["llama", "gpt2", "phi3", "opt", "qwen2_moe"], ["off", "on"]))
def test_uniform_widths_are_a_plain_folder_of_the_architecture(
    family: str, stream: str, tokenizer: PreTrainedTokenizerFast, calibration: pared.Calibration, tmp_path: Path
):
    dense = TINY_MODELS[family]()
    dense.save_pretrained(tmp_path / "dense")
    tokenizer.save_pretrained(tmp_path / "dense")
    recipe = pared.Recipe(
        model=str(tmp_path / "dense"), out=str(tmp_path / "small"), keep=0.8, structures="widths", multiple_of=4,
        allocation="uniform", statistics="once", calibration=calibration, evaluation=None, stream=stream,
    )  # fmt: skip
    outcome = pared.run(recipe)
    config = json.loads((tmp_path / "small" / "config.json").read_text())
    assert not {"quantization_config", "auto_map"} & config.keys()
    assert not (tmp_path / "small" / "modeling_pared.py").exists()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    assert not any(isinstance(module, NarrowLinear | NarrowConv1D) for module in model.modules())
    assert sum(p.numel() for p in model.parameters()) == outcome.manifest.plan.after.model_parameters
    assert model(TOKENS).logits.isfinite().all()
    assert pared.verify(tmp_path / "small") == 0
    card = (tmp_path / "small" / "README.md").read_text()
    assert "import pared" not in card
    model.save_pretrained(tmp_path / "again")
    assert "quantization_config" not in (tmp_path / "again" / "config.json").read_text()


def test_widths_of_their_own_need_the_loader(compressed: Callable[..., Any]):
    result = compressed("llama", structures="widths")
    assert len(set(widths(result))) > 1
    assert result.model.config.quantization_config.modules
    assert result.model.config.intermediate_size == 48


def test_an_mlp_that_is_narrower_than_one_step_of_widths_is_given_ranks(compressed: Callable[..., Any]):
    """It ended in an IndexError, of a table of no width."""
    mixed, ranks = (
        compressed("llama", structures=one, multiple_of=step) for one, step in (("mixed", 64), ("ranks", None))
    )
    assert [site.decision for site in mixed.plan.sites] == [site.decision for site in ranks.plan.sites]


@pytest.mark.parametrize(
    ("fields", "structures"),
    [
        ({}, "mixed"),
        ({"keep": 0.5}, "mixed"),
        ({"structures": "ranks"}, "ranks"),
        ({"allocation": "uniform"}, "ranks"),
        ({"allocation": "effective-rank"}, "ranks"),
        ({"refit": "update"}, "ranks"),
        ({"options": {"group_size": 2}}, "ranks"),
        ({"elastic": True}, "ranks"),
        ({"keep": None, "keep_bytes": 0.4}, "ranks"),
        ({"keep": None, "rank_fraction": 0.4}, "ranks"),
        ({"method": "svd-llm"}, "ranks"),
        ({"multiple_of": 32}, "mixed"),
    ],
    ids=str,
)
def test_by_itself_the_default_decides_ranks_and_widths_in_one_budget_where_that_goes(
    fields: dict[str, Any], structures: str
):
    given = {name: value for name, value in fields.items() if value is not None}
    assert resolve(pared.Recipe.of(given)).structures == structures
