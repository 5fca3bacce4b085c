"""``pared convert``: a low-rank folder stored anew is an ordinary folder with the same model in it."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import TINY_MODELS, VOCAB
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import pared
from pared import ParedError, Recipe
from pared.checkpoint import module_map, record, require_tensors
from pared.entrypoints.convert import convert
from pared.entrypoints.export import export_dense
from pared.modules import LowRankLinear, PivotedLinear
from pared.schema.manifest import Manifest
from unit.checkpoint.test_checkpoint import LOAD, logits, run_python
from unit.cli.test_commands import left_over, refused
from unit.cli.test_commands import pared as command

TOKENS = torch.randint(0, VOCAB, (2, 16), generator=torch.Generator().manual_seed(1))
FAMILIES = ["llama", "gpt2", "opt", "qwen2", "phi3"]


def compressed(place: Path, tokenizer: PreTrainedTokenizerFast, family: str, dtype: str = "float32") -> Path:
    TINY_MODELS[family]().save_pretrained(place / "dense")
    tokenizer.save_pretrained(place / "dense")
    recipe = Recipe(
        model=str(place / "dense"), out=str(place / "two"), method="svd", keep=0.6, evaluation=None, dtype=dtype
    )
    return pared.run(recipe).folder


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    return compressed(tmp_path_factory.mktemp("convert"), tokenizer, "llama")


@pytest.fixture(scope="module")
def pivoted(two: Path) -> Path:
    out = two.parent / "pivoted"
    code, told, err = command("convert", two, "--pivot", "--out", out, "--json", two.parent / "converted.json")
    assert code == 0, err
    for word in ("target parameters", "whole-model parameters", "bytes on disk", "self-check", str(out)):
        assert word in told
    return out


def kinds(folder: Path) -> set[str]:
    return {entry["kind"] for entry in module_map(pared.load(str(folder))).values()}


# The folder.


def test_the_pivoted_folder_answers_as_the_one_of_two_factors(two: Path, pivoted: Path) -> None:
    assert kinds(two) == {"low_rank"}
    assert kinds(pivoted) == {"pivoted"}
    torch.testing.assert_close(logits(pared.load(str(pivoted))), logits(pared.load(str(two))), atol=1e-4, rtol=1e-4)
    assert pared.verify(pivoted) < 1e-4


def test_the_manifest_tells_the_new_storage_and_keeps_the_recipe(two: Path, pivoted: Path) -> None:
    before, after = Manifest.read(two), Manifest.read(pivoted)
    assert after.recipe == before.recipe
    assert after.fingerprint == before.fingerprint
    assert after.self_check == pared.verify(pivoted)
    ranks = [site.decision.rank for site in before.plan.sites]
    assert [site.decision.rank for site in after.plan.sites] == ranks
    assert all(site.decision.pivoted for site in after.plan.sites)
    saved = before.plan.after.covered_parameters - after.plan.after.covered_parameters
    assert saved == sum(rank**2 for rank in ranks)
    assert after.bytes_on_disk == (pivoted / "model.safetensors").stat().st_size < before.bytes_on_disk
    inputs = sum(site.in_features for site in after.plan.sites)
    assert before.plan.after.bytes_on_disk - after.plan.after.bytes_on_disk == 4 * saved - 4 * inputs
    model = pared.load(str(pivoted))
    assert sum(p.numel() for p in model.parameters()) == after.plan.after.model_parameters
    told = json.loads((two.parent / "converted.json").read_text())
    assert told["converted"] == after.converted == "pivots and coefficients"
    assert "Converted to pivots and coefficients" in (pivoted / "README.md").read_text()


def test_no_pivot_gives_two_factors_back(two: Path, pivoted: Path, tmp_path: Path) -> None:
    code, _, err = command("convert", pivoted, "--no-pivot", "--out", tmp_path / "back")
    assert code == 0, err
    assert kinds(tmp_path / "back") == {"low_rank"}
    before, after = Manifest.read(two), Manifest.read(tmp_path / "back")
    assert after.plan == before.plan
    assert after.bytes_on_disk == pytest.approx(before.bytes_on_disk, rel=0.01)
    again, way = pared.load(str(tmp_path / "back")), pared.load(str(pivoted))
    for name, module in way.named_modules():
        if isinstance(module, PivotedLinear):
            assert torch.equal(again.get_submodule(name).weight, module.weight)
    torch.testing.assert_close(logits(again), logits(pared.load(str(two))), atol=1e-4, rtol=1e-4)


def test_a_pivoted_folder_reloads_and_saves_again_identically(pivoted: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(pivoted)
    assert torch.equal(logits(model), logits(pared.load(str(pivoted))))
    model.save_pretrained(tmp_path)
    for name in ("config.json", "modeling_pared.py", "model.safetensors"):
        assert (tmp_path / name).read_bytes() == (pivoted / name).read_bytes()
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(model))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_converts_there_and_back(family: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    two = compressed(tmp_path, tokenizer, family)
    expected = logits(pared.load(str(two)))
    for out, pivot in (("pivoted", True), ("back", False)):
        convert(two if pivot else tmp_path / "pivoted", tmp_path / out, pivot)
        torch.testing.assert_close(logits(pared.load(str(tmp_path / out))), expected, atol=1e-4, rtol=1e-4)
    export_dense(str(tmp_path / "pivoted"), tmp_path / "plain")
    plain, info = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    torch.testing.assert_close(logits(plain), expected, atol=1e-4, rtol=1e-4)


# Dtypes.


def test_a_bfloat16_folder_converts_within_the_rounding_of_its_dtype(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    two = compressed(tmp_path, tokenizer, "llama", "bfloat16")
    convert(two, tmp_path / "pivoted", pivoted=True)
    model = pared.load(str(tmp_path / "pivoted"))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    expected = pared.load(str(two))
    for name, module in expected.named_modules():
        if isinstance(module, LowRankLinear):
            found = model.get_submodule(name).weight
            assert (found - module.weight).norm() < 2e-2 * module.weight.norm()
    difference = (logits(model).float() - logits(expected).float()).norm()
    assert difference < 0.05 * logits(expected).float().norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_order_survives_loading_in_another_dtype(dtype: torch.dtype, pivoted: Path) -> None:
    stored = load_file(pivoted / "model.safetensors")
    orders = {name for name in stored if name.endswith(".order")}
    assert len(orders) == 21
    expected = logits(AutoModelForCausalLM.from_pretrained(pivoted))
    loaded = AutoModelForCausalLM.from_pretrained(pivoted, dtype=dtype)
    cast = AutoModelForCausalLM.from_pretrained(pivoted).to(dtype)
    for model in (loaded, cast):
        assert {parameter.dtype for parameter in model.parameters()} == {dtype}
        found = dict(model.named_buffers())
        for name in orders:
            assert found[name].dtype == stored[name].dtype == torch.int32
            assert torch.equal(found[name], stored[name])
        assert (logits(model).float() - expected).norm() < 0.05 * expected.norm()


def test_half_works_on_a_pivoted_model(pivoted: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(pivoted)
    expected = logits(model)
    assert {parameter.dtype for parameter in model.half().parameters()} == {torch.float16}
    assert {buffer.dtype for name, buffer in model.named_buffers() if name.endswith(".order")} == {torch.int32}
    assert (logits(model.float()) - expected).norm() < 0.01 * expected.norm()


# Training.


@pytest.mark.parametrize("parts", [["up"], ["down"], ["up", "down"]])
def test_lora_on_either_part_trains_a_step_merges_exactly_and_saves(
    parts: list[str], pivoted: Path, tmp_path: Path
) -> None:
    from peft import LoraConfig, get_peft_model

    base = AutoModelForCausalLM.from_pretrained(pivoted)
    before = logits(base)
    model = get_peft_model(base, LoraConfig(r=2, target_modules=parts, lora_dropout=0.0))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    assert sum("lora_A" in name for name, _ in model.named_parameters()) == 21 * len(parts)
    for _ in range(2):  # the first step only moves B away from zero
        model(input_ids=TOKENS, labels=TOKENS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    trained = logits(model)
    assert not torch.allclose(trained, before, atol=1e-3)
    merged = model.merge_and_unload()
    assert sum(isinstance(module, PivotedLinear) for module in merged.modules()) == 21
    torch.testing.assert_close(logits(merged), trained, atol=1e-5, rtol=1e-5)
    merged.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(merged))


# Without the package.


def test_a_machine_without_pared_loads_and_saves_a_pivoted_folder(pivoted: Path, tmp_path: Path) -> None:
    fields = {"blocked": "dict(pared=None)", "imports": "", "arguments": ", trust_remote_code=True"}
    run_python(LOAD, tmp_path, pivoted, **fields)
    expected = logits(pared.load(str(pivoted)))
    assert torch.equal(torch.load(tmp_path / "out.first"), expected)
    assert torch.equal(torch.load(tmp_path / "out.second"), expected)


# What goes wrong is told in a line, and nothing is left behind.


def change(folder: Path, name: str, value: Any) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors[name] = value(tensors[name])
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_nothing_to_convert_is_told(two: Path, pivoted: Path, tmp_path: Path) -> None:
    refused(command("convert", two, "--no-pivot", "--out", tmp_path / "out"), "nothing to convert", "two factors")
    refused(command("convert", pivoted, "--pivot", "--out", tmp_path / "out"), "nothing to convert", "pivoted")
    refused(command("convert", two.parent / "dense", "--out", tmp_path / "out"), "no pared.json")
    refused(command("convert", tmp_path / "nowhere", "--out", tmp_path / "out"), "no such folder")
    assert left_over(tmp_path) == []


def test_a_folder_is_not_converted_into_itself_or_over_another(two: Path, pivoted: Path, tmp_path: Path) -> None:
    refused(command("convert", two, "--out", two), "which is read")
    refused(command("convert", two, "--out", two, "--overwrite"), "which is read")
    refused(command("convert", two, "--out", pivoted), "is there already")
    shutil.copytree(two, tmp_path / "out")
    assert command("convert", two, "--out", tmp_path / "out", "--overwrite")[0] == 0
    assert kinds(tmp_path / "out") == {"pivoted"}


def test_a_damaged_weight_fails_the_self_check_and_nothing_is_written(two: Path, tmp_path: Path) -> None:
    damaged = Path(shutil.copytree(two, tmp_path / "damaged"))
    change(damaged, "model.layers.1.mlp.down_proj.up.weight", lambda tensor: tensor * 1.5)
    refused(command("convert", damaged, "--out", tmp_path / "out"), "model.safetensors is not what was written")
    record(damaged)
    refused(command("convert", damaged, "--out", tmp_path / "out"), "the self-check of what was made")
    change(damaged, "model.layers.1.mlp.down_proj.up.weight", lambda tensor: tensor / 0)
    record(damaged)
    refused(command("convert", damaged, "--out", tmp_path / "out"), "model.layers.1.mlp.down_proj", "NaN or infinity")
    assert left_over(tmp_path) == ["damaged"]


@pytest.mark.parametrize(
    "edit",
    [
        pytest.param(lambda order: order + 1, id="out of range"),
        pytest.param(lambda order: order * 0, id="not a permutation"),
        pytest.param(lambda order: order.float(), id="not integers"),
    ],
)
def test_a_damaged_order_is_refused_by_name(edit: Any, pivoted: Path, tmp_path: Path) -> None:
    damaged = Path(shutil.copytree(pivoted, tmp_path / "damaged"))
    change(damaged, "model.layers.1.mlp.down_proj.order", edit)
    for check in (pared.verify, require_tensors, lambda folder: convert(folder, tmp_path / "out", pivoted=False)):
        with pytest.raises(
            ParedError, match=r"model\.layers\.1\.mlp\.down_proj\.order is not a permutation of 0 to 47"
        ):
            check(damaged)


def test_info_and_eval_read_a_pivoted_folder(pivoted: Path) -> None:
    code, told, err = command("info", pivoted)
    assert code == 0, err
    assert ", pivoted" in told
    code, told, err = command("verify", pivoted)
    assert (code, "ok" in told) == (0, True), err
