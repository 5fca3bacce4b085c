"""Whether experts can be taken out, where numbers coincide and scores tie."""

import copy
from typing import Any

import pytest
import torch
from tiny_models import MIXTURES
from transformers import PreTrainedModel

from pared.structure import find_anatomy, probe
from pared.structure.experts import proved
from pared.structure.mixture import Mixture, mixtures_by_shape

FAMILIES = sorted(MIXTURES)


def model_of(family: str, experts: int, dtype: torch.dtype = torch.float32, **fields: Any) -> PreTrainedModel:
    """Return a tiny random mixture of so many experts."""
    whole = MIXTURES[family]()
    config = copy.deepcopy(whole.config)
    number = next(n for n in ("num_local_experts", "num_experts", "n_routed_experts") if hasattr(config, n))
    for name, value in {number: experts, **fields}.items():
        setattr(config, name, value)
    if hasattr(config, "layer_types"):
        config.layer_types = ["full_attention"] * config.num_hidden_layers
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return type(whole)._from_config(config, dtype=dtype).eval()


def mixtures(model: PreTrainedModel) -> list[Mixture]:
    anatomy, calls = probe(model, find_anatomy(model))
    blocks, first = anatomy.blocks(model), {call.block: call for call in reversed(calls)}
    return [
        proved(one, blocks[one.block], anatomy.block_name(one.block), first[one.block])
        for one in mixtures_by_shape(blocks, anatomy)
    ]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)])
def test_scores_of_a_router_that_tie_in_half_precision_are_not_taken_for_groups(family: str, dtype: torch.dtype):
    """Of two equal scores topk may pick the other once there are fewer; whole models were refused for that."""
    model = model_of(family, 96, dtype, num_experts_per_tok=8, num_hidden_layers=3)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = mixtures(model)
    assert [one.block for one in found] == list(range(1 if family == "deepseek_v3" else 0, 3))
    assert {(one.experts, one.picked, one.rescales) for one in found} == {(96, 8, family == "olmoe")}
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("family", FAMILIES)
def test_a_hidden_size_that_is_the_number_of_experts_by_chance_is_not_refused(family: str):
    """Hidden states had been reshaped to as many columns as experts stay."""
    found = mixtures(model_of(family, 32, num_experts_per_tok=3))  # as wide as there are experts
    assert {(one.experts, one.picked, one.rescales) for one in found} == {(32, 3, family == "olmoe")}
