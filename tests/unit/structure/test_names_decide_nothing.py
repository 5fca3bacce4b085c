"""What a layer is called decides nothing: grouping goes by shape, place, and what is read."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from passes import plan_of
from tiny_models import TINY_MODELS
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

import pared
from pared import Recipe
from pared.schema.plan import Plan
from pared.structure import find_anatomy, probe
from pared.structure.probe import probe_shapes

NAMES = {
    "q_proj": "wq", "k_proj": "wk", "v_proj": "wv", "o_proj": "wo", "gate_proj": "w1", "up_proj": "w3",
    "down_proj": "w2", "c_attn": "first", "c_proj": "second", "c_fc": "third", "dense": "dd", "fc1": "x", "fc2": "y",
    "out_proj": "z", "query_key_value": "all", "dense_h_to_4h": "wide", "dense_4h_to_h": "narrow",
}  # fmt: skip
# Names that stand for other layers elsewhere.
MISLEADING = {"q_proj": "fc2", "k_proj": "dense", "v_proj": "c_fc", "o_proj": "query", "gate_proj": "value",
              "up_proj": "key", "down_proj": "qkv_proj"}  # fmt: skip
RECIPES: list[dict[str, Any]] = [
    {"method": "basis-sharing", "options": {"sharing": "paper"}},
    {"method": "basis-sharing", "options": {"sharing": "measured"}},
    {"method": "svd-llm", "allocation": "effective-rank"},
    {"method": "svd", "allocation": "effective-rank"},
    {"method": "svd-llm-v2"},
    {"method": "swift-svd"},
]


def renamed(model: PreTrainedModel, names: dict[str, str], blocks: tuple[int, ...] | None = None) -> PreTrainedModel:
    """Call the layers of (some) blocks by other names; the model's code still says the old ones."""
    path = find_anatomy(model).blocks_path
    for index, block in enumerate(model.get_submodule(path)):
        if blocks is not None and index not in blocks:
            continue
        for owner in list(block.modules()):
            taken = {old: module for old, module in owner.named_children() if old in names}
            taken = {old: module for old, module in taken.items() if not list(module.children())}
            for old in taken:
                delattr(owner, old)
            for old, module in taken.items():
                owner.add_module(names[old], module)
            if taken:
                _redirect(owner, {old: names[old] for old in taken})
    return model


def _redirect(owner: nn.Module, names: dict[str, str]) -> None:
    """Let attributes by the old names find the layers by their new ones, also where both are in use."""
    children = owner._modules

    class Redirected(type(owner)):  # type: ignore[misc]
        def __getattribute__(self, name: str) -> Any:
            if name in names:
                return children[names[name]]
            return super().__getattribute__(name)

    Redirected.__qualname__, Redirected.__module__ = type(owner).__qualname__, type(owner).__module__
    owner.__class__ = Redirected


def decisions(plan: Plan) -> list[Any]:
    """Return what is decided for every layer, without names, in an order that is the same under renaming."""
    place = {site.name: number for number, site in enumerate(plan.sites)}
    assert len(place) == len(plan.sites)
    found = []
    for site in plan.sites:
        decision = site.decision.model_dump()
        decision.pop("owner", None)
        found.append((site.block, site.out_features, site.in_features, str(sorted(decision.items()))))
    return sorted(found)


@pytest.fixture
def compress(calibration: pared.Calibration, tokenizer: Any) -> Callable[..., Plan]:
    def run(model: PreTrainedModel, **recipe: Any) -> Plan:
        return pared.compress(model, tokenizer, Recipe(keep=0.6, calibration=calibration, **recipe)).plan

    return run


@pytest.mark.parametrize(
    ("family", "names", "blocks", "recipe"),
    [
        *(("llama", MISLEADING, None, recipe) for recipe in RECIPES),
        *(("llama", NAMES, (1,), recipe) for recipe in RECIPES),
        *((family, NAMES, None, recipe) for family in ("gpt2", "opt", "gpt_neox") for recipe in RECIPES[:3]),
    ],
)
def test_renamed_layers_are_grouped_alike(
    compress: Callable[..., Plan], family: str, names: dict[str, str], blocks: Any, recipe: dict[str, Any]
) -> None:
    """With q, k and v called wq, wk and wv no basis was shared, and D-Rank moved nothing to v."""
    as_named = compress(TINY_MODELS[family](), **recipe)
    other = compress(renamed(TINY_MODELS[family](), names, blocks), **recipe)
    assert decisions(other) == decisions(as_named)
    if recipe.get("options") == {"sharing": "paper"}:
        assert any(site.decision.kind == "shared" for site in as_named.sites)


@pytest.mark.parametrize("family", sorted(TINY_MODELS.keys() - {"qwen2_moe"}))
def test_what_is_read_together_is_found_on_the_meta_device(family: str) -> None:
    model = TINY_MODELS[family]()
    found = probe(model, find_anatomy(model))[0]
    with torch.device("meta"):
        skeleton = type(model)._from_config(model.config)
    assert probe_shapes(skeleton, find_anatomy(skeleton)) == found


@pytest.mark.parametrize("family", sorted(TINY_MODELS))
def test_a_plan_from_shapes_shares_what_the_compression_shares(family: str, compress: Callable[..., Plan]) -> None:
    model = TINY_MODELS[family]()
    recipe = Recipe(keep=0.6, method="basis-sharing", options={"sharing": "paper"})
    with torch.device("meta"):
        planned = plan_of(type(model)._from_config(model.config), recipe, 4)
    found = compress(model, method="basis-sharing", options={"sharing": "paper"}, refit="off")
    of_shapes, of_numbers = (
        # Which experts are given too few tokens, and leave a group, no shape tells.
        [(site.name, site.decision.kind) for site in plan.sites if ".experts." not in site.name]
        for plan in (planned, found)
    )
    assert of_shapes == of_numbers


def test_reads_are_guessed_where_no_pass_can_tell() -> None:
    model = TINY_MODELS["llama"]()
    guessed = find_anatomy(model).with_assumed_reads()
    assert [site.reads for site in guessed.sites] == [site.reads for site in probe(model, guessed)[0].sites]


def test_an_output_projection_that_widens_is_not_shared() -> None:
    """Heads narrower together than the hidden states (Mistral Nemo): o is wider than its input, as fc1 is."""
    config = LlamaConfig(vocab_size=64, hidden_size=40, intermediate_size=64, num_hidden_layers=2, head_dim=8,
                         num_attention_heads=4, num_key_value_heads=2)  # fmt: skip
    with torch.device("meta"):
        model = LlamaForCausalLM._from_config(config)
    plan = plan_of(model, Recipe(keep=0.6, method="basis-sharing", options={"sharing": "paper"}), 4)
    shared = {site.kind for site in plan.sites if site.decision.kind == "shared"}
    assert shared == {"q", "gate", "up"}
