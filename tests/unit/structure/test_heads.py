"""Heads of an attention: which rows and inputs go together, proved on the blocks, and what is refused with a reason."""

from typing import Any

import pytest
import torch
from tiny_models import FAMILIES, TINY_MODELS
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from pared.structure import Anatomy, find_anatomy, probe
from pared.structure.channels import find_channels
from pared.structure.groups import ChannelGroup, Found

GROUPED = ("self_attn.o_proj", {"q_proj": (16, 1), "k_proj": (8, 1), "v_proj": (8, 1)}, 2, {})
# family -> output layer, rows and parts of a head by layer, heads, attributes with what a head adds; of block 0
EXPECTED: dict[str, tuple[str, dict[str, tuple[int, int]], int, dict[str, int]]] = {
    "gpt2": ("attn.c_proj", {"c_attn": (24, 3)}, 4, {"split_size": 8}),
    "opt": ("self_attn.out_proj", {"q_proj": (8, 1), "k_proj": (8, 1), "v_proj": (8, 1)}, 4, {"num_heads": 1}),
    "gpt_neox": ("attention.dense", {"query_key_value": (24, 1)}, 4, {}),
    "bert": ("attention.output.dense", {"query": (8, 1), "key": (8, 1), "value": (8, 1)}, 4, {}),
}


def found(model: PreTrainedModel, skip: tuple[str, ...] = ()) -> tuple[Found, Anatomy]:
    anatomy, calls = probe(model, find_anatomy(model).without(skip))
    return find_channels(anatomy.blocks(model), anatomy, calls, heads=True), anatomy


def heads_of(model: PreTrainedModel) -> list[ChannelGroup]:
    return [group for group in found(model)[0].groups if group.unit == "head"]


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "phi3"])
def test_the_heads_of_every_block_are_found(family: str):
    model = TINY_MODELS[family]()
    there, anatomy = found(model)
    groups = [group for group in there.groups if group.unit == "head"]
    consumer, producers, heads, counts = EXPECTED.get(family, GROUPED)
    assert [group.consumer.block for group in groups] == list(range(len(anatomy.blocks(model))))
    first = groups[0]
    assert anatomy.path_in_block(first.consumer) == consumer
    made = {one.site.name.rpartition(".")[2]: (one.rows, one.parts) for one in first.producers}
    assert made == producers
    assert (first.channels, first.inputs) == (heads, 32 // heads)
    assert {one.attribute: one.each for one in first.counts} == counts
    assert sum(site.out_features * site.in_features for site in first.sites) == heads * first.parameters_each


def test_channels_are_those_found_without_heads():
    model = TINY_MODELS["llama"]()
    anatomy, calls = probe(model, find_anatomy(model))
    alone = find_channels(anatomy.blocks(model), anatomy, calls).groups
    assert [group for group in found(model)[0].groups if group.unit == "channel"] == list(alone)


def test_the_model_is_as_before():
    model = TINY_MODELS["opt"]()
    tokens = torch.arange(12)[None]
    before = model(tokens).logits
    found(model)
    assert torch.equal(model(tokens).logits, before)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert {layer.self_attn.num_heads for layer in model.model.decoder.layers} == {4}


def test_rows_and_inputs_of_a_head_are_named():
    (first, *_) = heads_of(TINY_MODELS["gpt2"]())
    assert first.producers[0].outputs(torch.tensor([1, 3])).tolist() == [
        start + number for start in (8, 24, 40, 56, 72, 88) for number in range(8)
    ]
    assert first.read(torch.tensor([1, 3])).tolist() == [*range(8, 16), *range(24, 32)]
    (first, *_) = heads_of(TINY_MODELS["gpt_neox"]())
    assert first.producers[0].outputs(torch.tensor([2])).tolist() == list(range(48, 72))


def test_half_precision_is_enough_to_see_every_head():
    assert [group.channels for group in heads_of(TINY_MODELS["gemma3"]().bfloat16())] == [2, 2, 2]


def llama(**fields: Any) -> PreTrainedModel:
    sizes = {"vocab_size": 64, "hidden_size": 48, "intermediate_size": 48, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 6, "num_key_value_heads": 3, **fields}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads)).eval()


@pytest.mark.parametrize(("query", "key"), [(6, 6), (6, 3), (6, 2), (12, 6)])
def test_heads_are_as_fine_as_they_can_be(query: int, key: int):
    (group,) = heads_of(llama(num_attention_heads=query, num_key_value_heads=key, head_dim=8))
    assert (group.channels, group.inputs) == (key, query // key * 8)


def test_one_key_value_head_cannot_be_taken_out():
    there, _ = found(llama(num_key_value_heads=1))
    assert "nor are they two or more heads" in there.reasons["model.layers.0.self_attn.o_proj"]


def test_a_head_count_in_the_configuration_is_a_reason():
    there, _ = found(TINY_MODELS["phi3"]())
    assert "nor are they two or more heads" in there.reasons["model.layers.0.self_attn.o_proj"]


def test_a_layer_that_is_skipped_is_a_reason():
    there, _ = found(TINY_MODELS["llama"](), skip=("*.0.self_attn.k_proj",))
    why = there.reasons["model.layers.0.self_attn.o_proj"]
    assert "model.layers.0.self_attn.k_proj, which is not a target" in why


class Mixed(nn.Module):
    """The output layer of an attention, with something else before it."""

    def __init__(self, old: nn.Module, kind: str) -> None:
        super().__init__()
        self.inner, self.kind = old, kind
        self.scale = nn.Parameter(torch.linspace(0.5, 1.5, 32))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.kind == "norm":
            x = x / (x.square().mean(dim=-1, keepdim=True) + 1e-5).sqrt()
        if self.kind == "scale":
            x = x * self.scale
        if self.kind == "counted":
            return self.inner(x) / x.shape[-1]
        return self.inner(x)


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        ("norm", "nor are they two or more heads"),
        ("scale", "its block does not run with fewer heads"),
        ("counted", "its block computes something else with fewer heads"),
    ],
)
def test_what_is_no_head_says_why(kind: str, why: str):
    model = TINY_MODELS["llama"]()
    attention = model.model.layers[0].self_attn
    attention.o_proj = Mixed(attention.o_proj, kind)
    there, _ = found(model)
    assert why in there.reasons["model.layers.0.self_attn.o_proj.inner"]
    assert len([group for group in there.groups if group.unit == "head"]) == 2  # of the other blocks
