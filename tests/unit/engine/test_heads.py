"""Attentions that lost heads: what they compute, with a cache too, and how they are saved, loaded and written out."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from saved_models import Saved, saved_once
from tiers import crossed
from tiny_models import FAMILIES, TINY_MODELS
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from pared import ParedError
from pared.checkpoint import load, mark, module_map, require_tensors
from pared.checkpoint.open_streamed import open_streamed
from pared.engine.install import Narrowed, count, narrow, put
from pared.engine.state.kept_blocks import KeptBlocks
from pared.engine.state.run_state import CompressionRun
from pared.entrypoints.export import make_dense
from pared.io.run_dir import RunDirectory
from pared.models.source import find_model
from pared.modules.narrow import counts_of
from pared.structure import find_anatomy, probe, weight_of
from pared.structure.channels import find_channels
from pared.structure.groups import ChannelGroup
from unit.checkpoint.test_checkpoint import LOAD, logits, run_python

HAVING = [family for family in FAMILIES if family != "phi3"]
SOME = ["llama", "gpt2", "opt", "gpt_neox"]  # grouped; fused side by side, or by head; counted by an attribute


def heads_of(model: PreTrainedModel) -> list[ChannelGroup]:
    anatomy, calls = probe(model, find_anatomy(model))
    found = find_channels(anatomy.blocks(model), anatomy, calls, heads=True)
    return [group for group in found.groups if group.unit == "head"]


def kept_of(group: ChannelGroup) -> torch.Tensor:
    """Return another number of heads in every block; where there are two the first block keeps both."""
    if group.channels == 2:
        return torch.tensor([[0, 1], [1], [0]][group.consumer.block])
    return torch.tensor([1, 3] if group.consumer.block else [0, 2, 3])


@torch.no_grad()
def narrowed(
    family: str, kept: Callable[[ChannelGroup], torch.Tensor] = kept_of
) -> tuple[PreTrainedModel, torch.Tensor]:
    """Return a model that lost heads, and what it answers where their output layers ignore them."""
    model, dense = TINY_MODELS[family](), TINY_MODELS[family]()
    for group in heads_of(model):
        kept_K = kept(group)
        gone = torch.ones(group.consumer.in_features, dtype=torch.bool)
        gone[group.read(kept_K)] = False
        weight_of(dense.get_submodule(group.name))[:, gone] = 0
        made = narrow(model, group, Narrowed(kept_K, weight_of(model.get_submodule(group.name))[:, group.read(kept_K)]))
        put(model, [name for name, _ in made], [module for _, module in made])
        count(model, group, len(kept_K))
    mark(model)
    return model, logits(dense)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Saved:
    """A family's folder, and what the model in memory answered; made once."""
    return saved_once(lambda family: narrowed(family)[0], logits, tmp_path_factory, tokenizer)


@pytest.mark.parametrize("family", HAVING)
def test_without_heads_it_answers_as_one_that_ignores_them(family: str):
    model, expected = narrowed(family)
    assert torch.allclose(logits(model), expected, atol=1e-5)
    assert sum(p.numel() for p in model.parameters()) < sum(p.numel() for p in TINY_MODELS[family]().parameters())


def greedy(model: PreTrainedModel, **options: object) -> list[int]:
    tokens = torch.tensor([[5, 9, 33, 7, 21]])
    found = model.generate(tokens, max_new_tokens=8, do_sample=False, pad_token_id=0, eos_token_id=None, **options)
    return found[0].tolist()


@pytest.mark.parametrize(
    ("family", "attention"), crossed([family for family in HAVING if family != "bert"], ["sdpa", "eager"])
)
def test_it_generates_with_a_cache_what_it_does_without(family: str, attention: str):
    model, _ = narrowed(family)
    model.set_attn_implementation(attention)
    expected = greedy(model, use_cache=False)
    assert len(expected) == 13
    assert greedy(model, use_cache=True) == expected
    assert greedy(model, cache_implementation="static") == expected


@pytest.mark.parametrize("family", SOME)
def test_its_folder_loads_with_plain_transformers(family: str, saved: Saved, tmp_path: Path):
    folder, expected = saved(family)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(logits(model), expected)
    require_tensors(folder)
    model.save_pretrained(tmp_path)
    for name in ("config.json", "modeling_pared.py", "model.safetensors"):
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()


def test_numbers_of_heads_are_in_the_map_where_a_module_counts_them(saved: Saved):
    maps = {family: json.loads((saved(family)[0] / "config.json").read_text()) for family in SOME}
    told = {family: one["quantization_config"].get("heads") for family, one in maps.items()}
    assert told == {
        "llama": None,
        "gpt_neox": None,
        "gpt2": {f"transformer.h.{block}.attn": {"split_size": size} for block, size in ((0, 24), (1, 16))},
        "opt": {f"model.decoder.layers.{block}.self_attn": {"num_heads": n} for block, n in ((0, 3), (1, 2))},
    }


@pytest.mark.slow  # a process of its own
def test_its_folder_loads_without_the_package(saved: Saved, tmp_path: Path):
    folder, expected = saved("opt")
    run_python(LOAD, tmp_path, folder, blocked="dict(pared=None)", imports="", arguments=", trust_remote_code=True")
    assert torch.equal(torch.load(tmp_path / "out.first"), expected)


@pytest.mark.parametrize("family", SOME)
def test_as_plain_weights_it_has_its_size_again_and_answers_the_same(family: str, saved: Saved, tmp_path: Path):
    folder, expected = saved(family)
    model = make_dense(load(folder))
    assert module_map(model) == counts_of(model) == {}
    assert {name: p.shape for name, p in model.named_parameters()} == {
        name: p.shape for name, p in TINY_MODELS[family]().named_parameters()
    }
    assert torch.allclose(logits(model), expected, atol=1e-5)
    model.save_pretrained(tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    assert torch.allclose(logits(plain), expected, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "gemma3", "qwen2_moe"])
def test_one_number_of_heads_is_a_plain_folder_of_the_architecture(family: str, tmp_path: Path):
    model, expected = narrowed(family, lambda group: torch.tensor([group.consumer.block % 2]))
    config = model.config.to_dict()
    assert not {"quantization_config", "auto_map"} & config.keys()
    assert (config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]) == (2, 1, 8)
    model.save_pretrained(tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(plain.get_submodule("model.layers.0.self_attn.q_proj")) is torch.nn.Linear
    assert torch.allclose(logits(plain), expected, atol=1e-5)
    assert torch.equal(logits(plain), logits(model))
    assert greedy(plain, use_cache=True) == greedy(plain, use_cache=False)


@pytest.mark.parametrize("family", ["gpt2", "opt", "gpt_neox"])
def test_an_architecture_that_divides_its_width_by_the_heads_needs_the_loader(family: str):
    model, _ = narrowed(family, lambda _: torch.tensor([0, 2]))
    assert model.config.quantization_config.modules
    assert model.config.num_attention_heads == 4


def test_a_number_that_the_configuration_refuses_needs_the_loader():
    """Llama's says that the number of heads divides the width of the model, whatever that of a head is."""
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "head_dim": 8}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=4)).eval()
    (group,) = heads_of(model)
    made = narrow(model, group, Narrowed(torch.arange(3), weight_of(model.get_submodule(group.name))[:, :24]))
    put(model, [name for name, _ in made], [module for _, module in made])
    mark(model)
    assert model.config.quantization_config.modules


@torch.no_grad()
def narrow_first(model: PreTrainedModel, group: ChannelGroup) -> None:
    made = narrow(model, group, Narrowed(torch.arange(3), weight_of(model.get_submodule(group.name))[:, :24]))
    put(model, [name for name, _ in made], [module for _, module in made])
    count(model, group, 3)


TOLD = {"model.decoder.layers.0.self_attn": {"num_heads": 3}}


def test_the_file_of_a_block_that_is_streamed_tells_its_heads(tmp_path: Path):
    TINY_MODELS["opt"]().save_pretrained(tmp_path / "dense")
    group = heads_of(TINY_MODELS["opt"]())[0]
    store, other = (open_streamed(find_model(str(tmp_path / "dense")), folder=tmp_path) for _ in range(2))
    store.load(0)
    narrow_first(store.model, group)
    store.commit(0)
    other.adopt(0, store.file_of(0))
    assert counts_of(other.model) == TOLD
    assert other.model.get_submodule(group.name.rpartition(".")[0]).num_heads == 3


def test_the_file_of_a_block_that_is_kept_tells_its_heads(tmp_path: Path):
    model, other = TINY_MODELS["opt"](), TINY_MODELS["opt"]()
    narrow_first(model, heads_of(model)[0])
    with RunDirectory.open(tmp_path / "out", "compress", {"seed": 0}) as directory:
        store, again = (KeptBlocks(one, find_anatomy(other), CompressionRun(directory)) for one in (model, other))
        store.commit(0)
        again.adopt(0, store.files[0])
    assert counts_of(other) == TOLD
    assert torch.equal(logits(other), logits(model))


NAME = "model.decoder.layers.0.self_attn"


@pytest.mark.parametrize(
    ("heads", "message"),
    [
        ({NAME: {"num_heads": 5}}, "num_heads is 5 in the map, 4 in the model"),
        ({NAME: {"num_layers": 2}}, "num_layers is 2 in the map, None in the model"),
        ({NAME: {"num_heads": True}}, "num_heads is True, expected 1 to"),
        ({NAME: {"__class__": 2}}, "'__class__' is not the name of an attribute"),
        ({NAME: {}}, "expected 1 to 8 numbers by name"),
        ({"nothing": {"num_heads": 2}}, "has no such module"),
        ([1], "expected numbers by name by module name"),
    ],
)
def test_numbers_that_do_not_fit_are_refused(heads: object, message: str, saved: Saved, tmp_path: Path):
    folder, _ = saved("opt")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["heads"] = heads
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises((ParedError, ValueError)) as raised:
        load(tmp_path)
    assert message in str(raised.value)
