"""Adapters land on the layers that were named, whatever they are stored as, and are merged without a trace."""

import copy
from typing import Any

import pytest
import torch
from tiny_models import TINY_MODELS
from transformers import PreTrainedModel, PreTrainedTokenizerFast

import pared
from pared import ParedError
from pared.cli.from_schema import named_values
from pared.modules import LowRankLinear, PivotedLinear, SparseLinear
from pared.schema.training import TrainingConfig
from pared.training import METHODS, lora
from pared.training.method import Context
from pared.training.trainable import compressed_layers
from pared.training.trainer import warmup_steps

KINDS: dict[str, dict[str, Any]] = {
    "factors": {"method": "svd", "storage": "factors", "keep": 0.6},
    "pivoted": {"method": "svd", "storage": "pivoted", "keep": 0.6},
    "shared": {"method": "basis-sharing", "options": {"sharing": "all"}, "keep": 0.7},
    "sparse": {"method": "magnitude", "sparsity": 0.5},
    "mixed": {"method": "svd", "storage": "factors", "keep": 0.6, "skip": ["*.v_proj", "*.0.*q_proj"]},
}
IDS = torch.arange(3, 21).view(2, 9)


@pytest.fixture(scope="module")
def model(tokenizer: PreTrainedTokenizerFast, calibration: pared.Calibration) -> Any:
    """Give a copy of a compressed model of every kind."""
    made: dict[str, PreTrainedModel] = {}

    def of(kind: str, family: str = "llama") -> PreTrainedModel:
        key = f"{family} {kind}"
        if key not in made:
            made[key] = TINY_MODELS[family]()
            recipe = {"calibration": calibration, "evaluation": None, **KINDS[kind]}
            pared.compress(made[key], tokenizer, pared.Recipe.of(recipe))
        return copy.deepcopy(made[key])

    return of


def prepared(model: PreTrainedModel, **options: Any) -> Any:
    tuning = TrainingConfig.of({"model": "folder", "method": "lora", "options": options})
    settled = {**METHODS["lora"].config.defaults(), **tuning.options}
    METHODS["lora"].config(**settled)
    context = Context(model, settled, tuning, None, 1, None, torch.device("cpu"), torch.float32)
    return lora.stages(settled)[0].prepare(context)


def wrapped(prepared_model: Any) -> set[str]:
    ends = (".lora_A", ".lora_A.default")
    names = {name for name, _ in prepared_model.named_modules() if name.endswith(ends)}
    return {name.removeprefix("base_model.model.").partition(".lora_A")[0] for name in names}


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_named_layers_of_every_kind_are_adapted_and_merged(model: Any, kind: str) -> None:
    changed = model(kind)
    before = {name: value.clone() for name, value in changed.state_dict().items()}
    ready = prepared(changed, rank=2, targets="*.q_proj,*.v_proj")
    sites = {name.removesuffix(".up") for name in wrapped(ready.model)}
    assert sites == {name for name in lora.adaptable(model(kind)) if name.endswith(("q_proj", "v_proj"))}
    assert len(sites) == 2 * 3
    trained = {name for name, parameter in ready.model.named_parameters() if parameter.requires_grad}
    assert all("lora_" in name for name in trained)
    with torch.no_grad():
        for name, parameter in ready.model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
        adapted = ready.model.eval()(IDS).logits
        merged = ready.finish().eval()
        masked = kind == "sparse"  # what is added where a weight is pruned is lost
        if not masked:
            torch.testing.assert_close(merged(IDS).logits, adapted, rtol=1e-4, atol=1e-4)
    after = merged.state_dict()
    moved = {name for name in after if name not in before or not torch.equal(after[name], before[name])}
    assert moved
    assert all("q_proj" in name or "v_proj" in name for name in moved)
    for name, layer in compressed_layers(merged).items():
        was = model(kind).get_submodule(name)
        assert type(layer) is type(was)
        if isinstance(layer, SparseLinear):
            assert torch.equal(layer.mask, was.mask)


def test_a_bare_name_is_the_end_of_names_and_a_list_is_taken(model: Any) -> None:
    patterns = lora.adapted_names(model("factors"), "*.q_proj,*.v_proj", "up")
    assert lora.adapted_names(model("factors"), "q_proj, v_proj", "up") == patterns
    listed = TrainingConfig.of({"options": {"targets": ["q_proj", "v_proj"]}})
    assert listed.options["targets"] == "q_proj,v_proj"
    assert lora.adapted_names(model("factors"), "model.layers.1.mlp.up_proj", "both") == [
        "model.layers.1.mlp.up_proj.up", "model.layers.1.mlp.up_proj.down"]  # fmt: skip


@pytest.mark.parametrize(
    ("given", "value"),
    [
        ("targets=*.q_proj,*.v_proj", "*.q_proj,*.v_proj"),
        ("targets=[q_proj, v_proj]", ["q_proj", "v_proj"]),
        ("targets=&x", "&x"),
        ("program=W:(ABS)-(MEAN)-(EXP,NO_OP)-(8)", "W:(ABS)-(MEAN)-(EXP,NO_OP)-(8)"),
        ("skip=*mlp*,a: b", "*mlp*,a: b"),
        ("skip=", ""),
        ("l1=1e-4", 1e-4),
        ("rank=16", 16),
        ("relearn=false", False),
        ("text=2026-02-30", "2026-02-30"),
    ],
)
def test_an_option_on_the_command_line_may_be_a_pattern(given: str, value: Any) -> None:
    """``*`` begins an alias in YAML, so that a pattern ended in a traceback."""
    found = named_values([given])
    assert found == {given.partition("=")[0]: value}


@pytest.mark.parametrize(("family", "ends"), [("llama", ("q_proj", "v_proj")), ("gpt2", ("c_attn",)),
                                              ("bert", ("query", "value")), ("opt", ("q_proj", "v_proj")),
                                              ("gpt_neox", ("query_key_value",))])  # fmt: skip
def test_peft_defaults_are_those_of_the_architecture(model: Any, family: str, ends: tuple[str, ...]) -> None:
    changed = model("factors", family)
    chosen = lora.adapted_names(changed, "peft", "up")
    assert chosen
    assert {name.removesuffix(".up").rpartition(".")[2] for name in chosen} == set(ends)
    ready = prepared(changed, rank=2, targets="peft")
    assert wrapped(ready.model) == set(chosen)


def test_a_conv1d_that_stayed_dense_is_adapted(tokenizer: PreTrainedTokenizerFast) -> None:
    changed = TINY_MODELS["gpt2"]()
    pared.compress(changed, tokenizer, pared.Recipe(method="svd", skip=("*c_attn",), evaluation=None))
    before = changed(IDS).logits
    ready = prepared(changed, rank=2, targets="c_attn,c_fc")
    assert {name.rpartition(".")[2] for name in wrapped(ready.model)} == {"c_attn", "up"}
    with torch.no_grad():
        for name, parameter in ready.model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
        adapted = ready.model.eval()(IDS).logits
        merged = ready.finish().eval()(IDS).logits
    torch.testing.assert_close(merged, adapted, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(merged, before, atol=1e-3)


def test_by_default_every_layer_that_pared_made_is_adapted_and_no_other(model: Any) -> None:
    changed = model("mixed")
    low = {name for name, layer in compressed_layers(changed).items() if isinstance(layer, LowRankLinear)}
    assert {f"{name}.up" for name in low} == set(lora.adapted_names(changed, "compressed", "up"))
    pivoted = model("pivoted")
    down = lora.adapted_names(pivoted, "compressed", "down")
    assert down == [f"{name}.down" for name, layer in compressed_layers(pivoted).items()
                    if isinstance(layer, PivotedLinear) and layer.down is not None]  # fmt: skip


def test_a_name_that_is_the_end_of_another_adapts_one_layer(model: Any) -> None:
    """PEFT takes names in a list for ends of names, so that a nested copy of a path would be adapted too."""
    changed = model("factors")
    changed.model.layers[0].add_module("model", copy.deepcopy(changed.model))
    name = "model.layers.1.mlp.up_proj"
    nested = f"model.layers.0.{name}"
    changed.get_submodule(nested)
    ready = prepared(changed, rank=2, targets=name)
    assert wrapped(ready.model) == {f"{name}.up"}


def test_a_pattern_that_matches_nothing_is_refused(model: Any) -> None:
    with pytest.raises(ParedError, match=r"pattern '\*\.q_projj' matches none of the 21 sites"):
        prepared(model("factors"), targets="q_projj")
    unknown = model("factors", "phi3")
    with pytest.raises(ParedError, match="PEFT has no default targets for a model of type 'phi3'; name the layers"):
        prepared(unknown, targets="peft")


def test_adapters_one_after_the_other_on_shared_bases_are_refused_before_the_first_is_trained(model: Any) -> None:
    shared = model("shared")
    sharing = [name for name, layer in compressed_layers(shared).items() if layer.shares is not None]
    with pytest.raises(ParedError, match="every basis of theirs is shared: adapt up, with order=together"):
        prepared(shared, targets=sharing, order="sequential")


def test_a_shared_basis_that_takes_no_adapter_is_told(model: Any) -> None:
    ready = prepared(model("shared"), rank=2, factor="both")
    shared = [name for name, layer in compressed_layers(model("shared")).items() if layer.shares is not None]
    (told,) = ready.notes
    assert f"the bases of {len(shared)} layers are shared and take no adapter" in told
    assert wrapped(ready.model).isdisjoint({f"{name}.down" for name in shared})
    assert prepared(model("factors"), rank=2, factor="both").notes == []


def test_warmup_is_a_share_of_the_steps_below_1_and_steps_from_1() -> None:
    assert [warmup_steps(asked, 1000) for asked in (0.0, 0.03, 0.5, 1, 100)] == [0, 30, 500, 1, 100]
    assert warmup_steps(100, 60) == 59
    assert warmup_steps(0.03, 1) == 0
