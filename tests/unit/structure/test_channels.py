"""Channels of an MLP: which layers lose them together, proved on the blocks, and what is refused with a reason."""

import pytest
import torch
from tiny_models import FAMILIES, REPEATED, TINY_MODELS
from torch import nn
from transformers import PreTrainedModel

from pared.structure import Anatomy, find_anatomy, probe
from pared.structure.channels import find_channels
from pared.structure.groups import Found, Producer

# family -> consumer, producers with rows per channel, channels; of block 0
EXPECTED = {
    "gpt2": ("mlp.c_proj", {"mlp.c_fc": 1}, 128),
    "opt": ("fc2", {"fc1": 1}, 48),
    "gpt_neox": ("mlp.dense_4h_to_h", {"mlp.dense_h_to_4h": 1}, 48),
    "phi3": ("mlp.down_proj", {"mlp.gate_up_proj": 2}, 48),
    "bert": ("output.dense", {"intermediate.dense": 1}, 48),
    "qwen2_moe": (
        "mlp.shared_expert.down_proj",
        {"mlp.shared_expert.gate_proj": 1, "mlp.shared_expert.up_proj": 1},
        40,
    ),
}
GATED = ("mlp.down_proj", {"mlp.gate_proj": 1, "mlp.up_proj": 1}, 48)


def found(model: PreTrainedModel, skip: tuple[str, ...] = ()) -> tuple[Found, Anatomy]:
    anatomy, calls = probe(model, find_anatomy(model).without(skip))
    return find_channels(anatomy.blocks(model), anatomy, calls), anatomy


def reason(model: PreTrainedModel, skip: tuple[str, ...] = ()) -> str:
    """Return why the MLP of the first block of a Llama has no channels."""
    return found(model, skip)[0].reasons["model.layers.0.mlp.down_proj"]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_mlp_of_every_block_is_found(family: str):
    model = TINY_MODELS[family]()
    there, anatomy = found(model)
    consumer, producers, width = EXPECTED.get(family, GATED)
    assert [group.consumer.block for group in there.groups] == list(range(len(anatomy.blocks(model))))
    first = there.groups[0]
    assert anatomy.path_in_block(first.consumer) == consumer
    assert {anatomy.path_in_block(one.site): one.rows for one in first.producers} == producers
    assert all(one.parts == one.rows for one in first.producers)
    assert first.channels == width
    assert {site.name for site in anatomy.sites} == {*there.reasons, *(group.name for group in there.groups)}


@pytest.mark.parametrize("family", sorted(REPEATED))
def test_blocks_that_run_several_times_have_channels_too(family: str):
    there, _ = found(REPEATED[family]())
    assert all(group.name.endswith("ffn_output") for group in there.groups)
    assert there.groups


def test_the_model_is_as_before():
    model = TINY_MODELS["llama"]()
    tokens = torch.arange(12)[None]
    before = model(tokens).logits
    found(model)
    assert torch.equal(model(tokens).logits, before)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert not any("forward" in vars(module) for module in model.modules())


class Between(nn.Module):
    """An MLP of a Llama that does something else between gate, up and down."""

    def __init__(self, mlp: nn.Module, kind: str) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj, self.kind = mlp.gate_proj, mlp.up_proj, mlp.down_proj, kind
        self.scale = nn.Parameter(torch.linspace(0.5, 1.5, 48))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = self.gate_proj(x), self.up_proj(x)
        h = nn.functional.silu(gate) * up
        if self.kind == "norm":
            h = h / (h.square().mean(dim=-1, keepdim=True) + 1e-5).sqrt()
        if self.kind == "shifted":
            h = nn.functional.silu(gate) * up.roll(1, dims=-1)
        if self.kind == "view":
            h = h.view(*x.shape[:-1], 48)
        if self.kind == "scale":
            h = h * self.scale
        if self.kind == "fewer tokens":
            return torch.cat([self.down_proj(h[:, :3]), x[:, 3:]], dim=1)
        y = self.down_proj(h)
        if self.kind == "read twice":
            y = y + gate.mean(dim=-1, keepdim=True)
        if self.kind == "counted":
            y = y / h.shape[-1]
        return y


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        ("norm", "its inputs do not each depend on one channel"),
        ("shifted", "its inputs do not each depend on one channel"),
        ("view", "does not run with fewer channels"),
        ("scale", "does not run with fewer channels"),
        ("read twice", "something besides it reads what"),
        ("fewer tokens", "it reads 3 of the "),
        ("counted", "its block computes something else with fewer channels"),
    ],
)
def test_what_is_no_channel_says_why(kind: str, why: str):
    model = TINY_MODELS["llama"]()
    model.model.layers[0].mlp = Between(model.model.layers[0].mlp, kind)
    assert why in reason(model)
    assert len(found(model)[0].groups) == 2  # of the other blocks


def test_a_producer_that_is_skipped_is_a_reason():
    why = reason(TINY_MODELS["llama"](), skip=("*.0.mlp.up_proj",))
    assert why == "what it reads is made by model.layers.0.mlp.up_proj, which is not a target"


class Interleaved(nn.Module):
    """A fused gate and up whose rows take turns."""

    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        self.gate_up_proj, self.down_proj = mlp.gate_up_proj, mlp.down_proj

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        both = self.gate_up_proj(x)
        return self.down_proj(nn.functional.silu(both[..., ::2]) * both[..., 1::2])


def test_rows_that_take_turns_are_found():
    model = TINY_MODELS["phi3"]()
    for layer in model.model.layers:
        layer.mlp = Interleaved(layer.mlp)
    group = found(model)[0].groups[0]
    (producer,) = group.producers
    assert (producer.rows, producer.parts) == (2, 1)
    assert producer.outputs(torch.tensor([0, 3])).tolist() == [0, 1, 6, 7]
    assert group.parameters_each == 32 + 2 * 32


def test_rows_apart_are_named_part_by_part():
    group = found(TINY_MODELS["phi3"]())[0].groups[0]
    (producer,) = group.producers
    assert producer == Producer(producer.site, 2, 2)
    assert producer.outputs(torch.tensor([0, 3])).tolist() == [0, 3, 48, 51]
    assert producer.parts == 2


def test_half_precision_is_enough_to_see_every_channel():
    there, _ = found(TINY_MODELS["gemma3"]().bfloat16())
    assert len(there.groups) == 3
