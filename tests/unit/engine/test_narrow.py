"""Narrow layers in the place of a group's: what they compute, how they are saved and loaded, and as plain weights."""

import json
from pathlib import Path

import pytest
import torch
import transformers
from saved_models import Saved, saved_once
from tiers import some
from tiny_models import FAMILIES, TINY_MODELS
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from pared import ParedError
from pared.checkpoint import load, mark, module_map, require_tensors
from pared.engine.install import Narrowed, narrow, put
from pared.entrypoints.export import make_dense
from pared.modules import NarrowConv1D, NarrowLinear
from pared.structure import find_anatomy, probe, weight_of
from pared.structure.channels import find_channels
from pared.structure.groups import ChannelGroup
from unit.checkpoint.test_checkpoint import LOAD, logits, run_python


def groups_of(model: PreTrainedModel) -> tuple[ChannelGroup, ...]:
    anatomy, calls = probe(model, find_anatomy(model))
    return find_channels(anatomy.blocks(model), anatomy, calls).groups


def kept_of(group: ChannelGroup) -> torch.Tensor:
    """Return other channels, and another number of them, in every block."""
    return torch.arange(group.consumer.block, group.channels, 2)[: group.channels // 2 - group.consumer.block]


@torch.no_grad()
def narrowed(family: str) -> tuple[PreTrainedModel, torch.Tensor]:
    """Return a model that lost channels, and what it answers where their consumers ignore them."""
    model = TINY_MODELS[family]()
    groups = groups_of(model)
    dense = TINY_MODELS[family]()
    for group in groups:
        gone = torch.ones(group.channels, dtype=torch.bool)
        gone[kept_of(group)] = False
        weight_of(dense.get_submodule(group.name))[:, gone] = 0
        weight = weight_of(model.get_submodule(group.name))[:, kept_of(group)]
        for name, new in narrow(model, group, Narrowed(kept_of(group), weight)):
            put(model, [name], [new])
    mark(model)
    return model, logits(dense)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Saved:
    """A family's folder, and what the model in memory answered; made once."""
    return saved_once(lambda family: narrowed(family)[0], logits, tmp_path_factory, tokenizer)


@pytest.mark.parametrize("family", some(("llama", "gpt2", "phi3", "opt"), FAMILIES))
def test_a_narrow_model_answers_as_one_that_ignores_the_channels(family: str):
    model, expected = narrowed(family)
    assert torch.allclose(logits(model), expected, atol=1e-5)
    layers = [module for module in model.modules() if isinstance(module, NarrowLinear | NarrowConv1D)]
    assert len(layers) == sum(len(group.sites) for group in groups_of(TINY_MODELS[family]()))
    assert all(isinstance(layer, nn.Linear | transformers.pytorch_utils.Conv1D) for layer in layers)
    dense, small = (sum(p.numel() for p in one.parameters()) for one in (TINY_MODELS[family](), model))
    assert small < 0.9 * dense


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3", "opt"])
def test_a_narrow_folder_loads_with_plain_transformers(family: str, saved: Saved, tmp_path: Path):
    folder, expected = saved(family)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(logits(model), expected)
    require_tensors(folder)
    model.save_pretrained(tmp_path)
    for name in ("config.json", "modeling_pared.py", "model.safetensors"):
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()


@pytest.mark.slow  # a process of its own
def test_a_narrow_folder_loads_without_the_package(saved: Saved, tmp_path: Path):
    folder, expected = saved("gpt2")
    run_python(LOAD, tmp_path, folder, blocked="dict(pared=None)", imports="", arguments=", trust_remote_code=True")
    assert torch.equal(torch.load(tmp_path / "out.first"), expected)


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3", "opt"])
def test_as_plain_weights_it_has_its_size_again_and_answers_the_same(family: str, saved: Saved, tmp_path: Path):
    folder, expected = saved(family)
    model = make_dense(load(folder))
    assert module_map(model) == {}
    assert {name: p.shape for name, p in model.named_parameters()} == {
        name: p.shape for name, p in TINY_MODELS[family]().named_parameters()
    }
    model.save_pretrained(tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    assert torch.allclose(logits(plain), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"out_features": 49}, "shape [32, 48] in the model"),
        ({"in_features": 31, "parts": 5}, "outputs are not 5 equal parts"),
        ({"kind": "narrow_conv1d"}, "has one"),
        ({"kind": "narrow_conv1d", "bias": True}, "shape [32, 48] in the model"),
        ({"parts": 0}, "parts is 0, expected 1 to"),
        ({"parts": None}, "parts is None, expected a whole number"),
    ],
)
def test_a_map_that_does_not_fit_is_refused(change: dict[str, object], message: str, saved: Saved, tmp_path: Path):
    folder, _ = saved("llama")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["modules"]["model.layers.0.mlp.gate_proj"] |= change
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises((ParedError, ValueError), match=message.replace("[", r"\[").replace("]", r"\]")):
        load(tmp_path)
