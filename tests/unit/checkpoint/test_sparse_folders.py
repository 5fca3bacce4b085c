"""Packed sparse folders: as plain weights again, what their sizes are told as, and what is refused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiers import some
from tiny_models import TINY_MODELS
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import pared
from pared.checkpoint import module_map
from pared.entrypoints.export import make_dense
from pared.modules import SparseLinear
from unit.checkpoint.test_checkpoint import LOAD, logits, run_python
from unit.cli.test_commands import left_over, refused
from unit.cli.test_commands import pared as command

BUDGETS = {"unstructured": {"sparsity": 0.5}, "2:4": {"pattern": "2:4"}}
Pruned = Callable[[str, str], Path]


@pytest.fixture(scope="module")
def pruned(
    tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast, calibration: pared.Calibration
) -> Pruned:
    """The folder of a family and a budget, made once; the dense one lies beside it."""
    made: dict[tuple[str, str], Path] = {}

    def folder(family: str, budget: str) -> Path:
        if (family, budget) not in made:
            place = tmp_path_factory.mktemp("pruned")
            TINY_MODELS[family]().save_pretrained(place / "dense")
            tokenizer.save_pretrained(place / "dense")
            recipe = pared.Recipe.model_validate({
                "model": str(place / "dense"), "out": str(place / "small"), "method": "wanda",
                "calibration": calibration, "evaluation": None, **BUDGETS[budget],
            })  # fmt: skip
            made[family, budget] = pared.run(recipe).folder
        return made[family, budget]

    return folder


# Plain weights again.


@pytest.mark.parametrize("way", [("export", "--to", "dense"), ("convert", "--dense")], ids=["export", "convert"])
@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_a_sparse_folder_becomes_a_plain_one_that_answers_the_same(
    family: str, budget: str, way: tuple[str, ...], pruned: Pruned, tmp_path: Path
) -> None:
    small, plain = pruned(family, budget), tmp_path / "plain"
    code, told, err = command(way[0], small, *way[1:], "--out", plain)
    assert code == 0, err
    assert "self-check: reloaded, largest relative difference 0" in told
    config = json.loads((plain / "config.json").read_text())
    assert config.keys().isdisjoint({"quantization_config", "auto_map"})
    assert not list(plain.glob("*.py"))
    model, info = AutoModelForCausalLM.from_pretrained(plain, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not module_map(model)
    before = pared.load(small)
    assert torch.equal(logits(model), logits(before))
    dense = load_file(small.parent / "dense" / "model.safetensors")
    stored = load_file(plain / "model.safetensors")
    assert {name: tensor.shape for name, tensor in stored.items()} == {n: t.shape for n, t in dense.items()}
    for name, module in before.named_modules():
        if isinstance(module, SparseLinear):  # what was kept is the dense model's, bit for bit
            there = stored[f"{name}.weight"]
            assert torch.equal(there, torch.where(there == 0, 0, dense[f"{name}.weight"]))


def test_both_commands_write_the_same_bytes(pruned: Pruned, tmp_path: Path) -> None:
    small = pruned("llama", "2:4")
    command("export", small, "--out", tmp_path / "one")
    command("convert", small, "--dense", "--out", tmp_path / "two", "--json", tmp_path / "told.json")
    assert left_over(tmp_path / "one") == left_over(tmp_path / "two")
    for name in left_over(tmp_path / "one"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    told = json.loads((tmp_path / "told.json").read_text())
    assert told["bytes_before"] == (small / "model.safetensors").stat().st_size
    assert told["bytes_on_disk"] == (tmp_path / "two" / "model.safetensors").stat().st_size
    assert told["self_check"] <= 1e-6


def test_a_folder_that_was_saved_again_without_a_manifest_becomes_plain_too(pruned: Pruned, tmp_path: Path) -> None:
    model = pared.load(pruned("llama", "unstructured"))
    model.save_pretrained(tmp_path / "again")
    pared.load_tokenizer(pruned("llama", "unstructured")).save_pretrained(tmp_path / "again")
    code, _, err = command("convert", tmp_path / "again", "--dense", "--out", tmp_path / "plain")
    assert code == 0, err
    assert torch.equal(logits(pared.load(tmp_path / "plain")), logits(model))


def test_a_layer_that_is_still_packed_is_made_dense_too(pruned: Pruned) -> None:
    model = pared.load(pruned("llama", "unstructured"))
    expected, name = logits(model), "model.layers.0.mlp.up_proj"
    state = model.get_submodule(name).state_dict()
    packed = SparseLinear(**model.get_submodule(name).entry())
    packed.load_state_dict(state)
    model.get_submodule("model.layers.0.mlp").up_proj = packed
    assert packed.packed
    assert torch.equal(logits(make_dense(model)), expected)


# Without the package.


@pytest.mark.parametrize("budget", some(list(BUDGETS)[:1], BUDGETS))
def test_a_machine_without_pared_loads_and_saves_a_sparse_folder(budget: str, pruned: Pruned, tmp_path: Path) -> None:
    small = pruned("llama", budget)
    run_python(LOAD, tmp_path, small, blocked="dict(pared=None)", imports="", arguments=", trust_remote_code=True")
    expected = logits(pared.load(small))
    assert torch.equal(torch.load(tmp_path / "out.first"), expected)
    assert torch.equal(torch.load(tmp_path / "out.second"), expected)


# Refusals.


def test_a_sparse_folder_has_no_pivots(pruned: Pruned, tmp_path: Path) -> None:
    for way in ("--pivot", "--no-pivot"):
        result = command("convert", pruned("llama", "2:4"), way, "--out", tmp_path / "out")
        refused(result, "nothing to convert", "21 changed layers are sparse", "model.layers.0", "--dense")
    refused(command("convert", pruned("llama", "2:4"), "--out", tmp_path / "out"), "sparse", "--dense")
    assert left_over(tmp_path) == []


def test_what_is_plain_or_not_there_or_asked_for_twice_is_refused(pruned: Pruned, tmp_path: Path) -> None:
    small = pruned("llama", "2:4")
    out = ("--dense", "--out", tmp_path / "out")
    refused(command("convert", small.parent / "dense", *out), "its weights are plain already")
    refused(command("convert", tmp_path / "nowhere", *out), "no such folder")
    refused(command("convert", small, "--no-pivot", *out), "--dense and --no-pivot")
    refused(command("convert", small, "--dense", "--overwrite", "--out", small), "which is read")
    assert left_over(tmp_path) == []
    assert pared.verify(small) <= 1e-6


def test_damaged_bits_are_refused_and_nothing_is_written(pruned: Pruned, tmp_path: Path) -> None:
    damaged = Path(shutil.copytree(pruned("llama", "unstructured"), tmp_path / "damaged"))
    tensors = load_file(damaged / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.bits"] ^= 1
    save_file(tensors, damaged / "model.safetensors", metadata={"format": "pt"})
    for way in (("export",), ("convert", "--dense")):
        refused(command(way[0], damaged, *way[1:], "--out", tmp_path / "out"), "unreadable", "for a mask that keeps")
    assert left_over(tmp_path) == ["damaged"]
