"""Heads in a compression: how many stay, the compensated weight, and what becomes of the folder."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from passes import UNSHRUNK
from tiers import crossed
from tiny_models import FAMILIES, TINY_MODELS
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

import pared
from pared import ParedError
from pared.data.windows import Windows, digest_of
from pared.progress import Silent
from pared.schema.width import Width, channels_of
from pared.structure import weight_of
from unit.engine.families.test_widths import inputs_of

TOKENS = torch.randint(1, 64, (8, 24), generator=torch.Generator().manual_seed(3))
WINDOWS = Windows(TOKENS, digest_of(TOKENS), "words", "a test", stand_in=True)


@pytest.fixture(scope="module")
def compressed(tokenizer: PreTrainedTokenizerFast, calibration: pared.Calibration) -> Callable[..., Any]:
    def compress(model: str | PreTrainedModel, **fields: Any) -> Any:
        model = TINY_MODELS[model]() if isinstance(model, str) else model
        asked = {"keep": 0.6, "structures": "widths", "heads": "on", "multiple_of": 4, "statistics": "once"}
        asked["options"] = UNSHRUNK
        return pared.compress(model, tokenizer, calibration=calibration, evaluation=None, **{**asked, **fields})

    return compress


def heads(result: Any) -> dict[str, Width]:
    """Return the decisions of the output layers of attentions that lost heads."""
    decided = {site.name: site.decision for site in result.plan.sites}
    return {
        name: one for name, one in decided.items() if isinstance(one, Width) and (one.unit, one.side) == ("head", "in")
    }


@pytest.mark.parametrize(
    ("family", "structures"), crossed([family for family in FAMILIES if family != "bert"], ["widths", "mixed"])
)
def test_the_plan_counts_what_there_is(family: str, structures: str, compressed: Callable[..., Any]):
    before = sum(parameter.numel() for parameter in TINY_MODELS[family]().parameters())
    result = compressed(family, structures=structures)
    assert result.plan.before.model_parameters == before
    assert result.plan.after.model_parameters == sum(parameter.numel() for parameter in result.model.parameters())
    assert result.plan.achieved_keep <= 0.6
    for site in result.plan.sites:
        if isinstance(site.decision, Width):
            stored = result.model.get_submodule(site.name).named_parameters()  # one weight, or those of its ranks
            assert sum(one.numel() for name, one in stored if not name.endswith("bias")) == site.after
    if structures == "widths":
        assert bool(heads(result)) == (family not in ("phi3", "qwen2_moe"))  # no heads are found; channels are cheaper
    assert all(1 <= one.width < one.channels for one in heads(result).values())
    assert result.model(TOKENS).logits.isfinite().all()


def test_the_output_layer_is_the_least_squares_weight(compressed: Callable[..., Any]):
    dense = TINY_MODELS["llama"]()
    result = compressed("llama", windows=WINDOWS)
    assert heads(result)
    for name, decision in heads(result).items():
        A_NN = inputs_of(dense, name, TOKENS)
        A_NN.diagonal().add_(1e-4 * A_NN.diagonal().mean())
        (head,) = channels_of(decision.kept or "")
        kept, gone = list(range(16 * head, 16 * head + 16)), list(range(16 - 16 * head, 32 - 16 * head))
        W_ON = weight_of(dense.get_submodule(name)).detach().double()
        expected = W_ON[:, kept] + W_ON[:, gone] @ A_NN[gone][:, kept] @ torch.linalg.inv(A_NN[kept][:, kept])
        found = weight_of(result.model.get_submodule(name)).detach().double()
        assert (found - expected).norm() < 1e-4 * expected.norm()
        attention = name.rpartition(".")[0]
        for layer, rows in (("q_proj", kept), ("k_proj", range(8 * head, 8 * head + 8)), ("v_proj", None)):
            rows = list(range(8 * head, 8 * head + 8)) if rows is None else list(rows)
            whole, narrow = (one.get_submodule(f"{attention}.{layer}").weight for one in (dense, result.model))
            assert torch.equal(narrow, whole[rows])


@pytest.mark.parametrize(
    ("family", "keep", "kept"),
    [("llama", 0.8, "1"), ("gpt2", 5 / 6, "1,3"), ("opt", 5 / 7, "1,3"), ("gpt_neox", 5 / 7, "1,3")],
)
def test_heads_whose_values_are_zero_cost_nothing(family: str, keep: float, kept: str, compressed: Callable[..., Any]):
    model = TINY_MODELS[family]()
    _empty_heads(model, family)
    dense = model(TOKENS).logits.detach()
    result = compressed(model, keep=keep + 1e-9)
    assert {one.kept for one in heads(result).values()} == {kept}
    assert torch.allclose(result.model(TOKENS).logits, dense, atol=1e-5)


@torch.no_grad()
def _empty_heads(model: PreTrainedModel, family: str) -> None:
    """Make the values of every other head zero."""
    for name, module in model.named_modules():
        leaf = name.rpartition(".")[2]
        if leaf == "v_proj":
            rows = range(8) if family == "llama" else [*range(8), *range(16, 24)]
        elif leaf == "c_attn":
            rows = [64 + row for row in (*range(8), *range(16, 24))]
        elif leaf == "query_key_value":
            rows = [row for head in (0, 2) for row in range(24 * head + 16, 24 * head + 24)]
        else:
            continue
        weight_of(module)[list(rows)] = 0
        if module.bias is not None:
            module.bias[list(rows)] = 0


def test_sequential_statistics_choose_heads_anew(compressed: Callable[..., Any]):
    once, behind = (
        compressed("llama", windows=WINDOWS, statistics=when, dense_path=path)
        for when, path in (("once", "auto"), ("sequential", 0.5))
    )
    assert {name: one.width for name, one in heads(once).items()} == {
        name: one.width for name, one in heads(behind).items()
    }
    last = sorted(heads(once))[-1]
    assert not torch.equal(*(one.model.get_submodule(last).weight for one in (once, behind)))


def test_without_the_option_heads_stay(compressed: Callable[..., Any]):
    assert not heads(compressed("llama", heads="off", keep=0.8))


def test_by_default_heads_go_where_widths_alone_are_spread_by_loss(compressed: Callable[..., Any]):
    assert heads(compressed("llama", heads="auto"))
    assert pared.Recipe(heads=True, structures="widths").heads == "on"
    assert not heads(compressed("llama", heads="auto", structures="mixed", keep=0.8))
    assert not heads(compressed("llama", heads="auto", allocation="uniform", keep=0.8))


def test_heads_with_ranks_alone_are_refused(compressed: Callable[..., Any]):
    with pytest.raises(ParedError, match="heads are taken out with widths, and here ranks are decided"):
        compressed("llama", structures="ranks", multiple_of=None)


class Told(Silent):
    """Keeps the notes."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


def test_heads_that_cannot_be_found_are_told(compressed: Callable[..., Any]):
    told = Told()
    assert not heads(compressed("phi3", structures="mixed", progress=told))
    assert any("no heads were found that can be taken out; model.layers.0.self_attn.o_proj" in n for n in told.notes)


@pytest.mark.parametrize(("family", "stream"), crossed(["llama", "opt"], ["off", "on"]))
def test_a_folder_answers_as_the_model(
    family: str, stream: str, tokenizer: PreTrainedTokenizerFast, calibration: pared.Calibration, tmp_path: Path
):
    TINY_MODELS[family]().save_pretrained(tmp_path / "dense")
    tokenizer.save_pretrained(tmp_path / "dense")
    recipe = pared.Recipe(
        model=str(tmp_path / "dense"), out=str(tmp_path / "small"), keep=0.6, structures="mixed", heads="on",
        multiple_of=4, statistics="once", calibration=calibration, evaluation=None, stream=stream,
    )  # fmt: skip
    outcome = pared.run(recipe)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    assert sum(p.numel() for p in model.parameters()) == outcome.manifest.plan.after.model_parameters
    assert pared.verify(tmp_path / "small") == 0
    found = model.generate(TOKENS[:1, :5], max_new_tokens=6, do_sample=False, pad_token_id=0, eos_token_id=None)
    again = model.generate(
        TOKENS[:1, :5], max_new_tokens=6, do_sample=False, pad_token_id=0, eos_token_id=None, use_cache=False
    )
    assert torch.equal(found, again)
    config = json.loads((tmp_path / "small" / "config.json").read_text())["quantization_config"]
    if any(entry["kind"] == "pivoted" for entry in config["modules"].values()):
        pared.convert(tmp_path / "small", tmp_path / "factors", pivoted=False)
        assert pared.verify(tmp_path / "factors") < 1e-4
