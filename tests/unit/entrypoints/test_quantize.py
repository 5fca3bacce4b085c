"""Few bits from a recipe to a folder: what is stored is what is loaded, in the bytes that the plan says."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import TINY_MODELS, VOCAB
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import pared
from pared import ParedError, Recipe
from pared.checkpoint import module_map, require_tensors
from pared.engine.spec import resolve
from pared.modules import LowRankLinear, QuantizedLinear
from pared.serving.vllm.layout import UnsupportedError, members_of

TOKENS = torch.randint(0, VOCAB, (2, 16), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    made = tmp_path_factory.mktemp("bits")
    for family in ("llama", "gpt2"):
        TINY_MODELS[family]().save_pretrained(made / family)
        tokenizer.save_pretrained(made / family)
    return made


def stored(place: Path, family: str, name: str, calibration: pared.Calibration, **fields: object) -> Path:
    recipe = Recipe.of({
        "model": str(place / family), "out": str(place / name), "evaluation": None, "calibration": calibration, **fields
    })  # fmt: skip
    return pared.run(recipe).folder


@pytest.fixture(scope="module")
def int4(place: Path, calibration: pared.Calibration) -> Path:
    return stored(place, "llama", "int4", calibration, quantize="int4")


@pytest.fixture(scope="module")
def factors(place: Path, calibration: pared.Calibration) -> Path:
    return stored(place, "llama", "factors", calibration, quantize="int8", method="svd-llm", keep=0.6)


def logits(folder: Path) -> torch.Tensor:
    with torch.no_grad():
        return pared.load(folder)(TOKENS).logits


def test_few_bits_alone_round_every_target_and_nothing_else(int4: Path, place: Path) -> None:
    plan = pared.Manifest.read(int4).plan
    assert {(site.decision.kind, site.decision.quantized) for site in plan.sites} == {("dense", "int4")}
    model, dense = pared.load(int4), pared.load(place / "llama")
    changed = {name for name, module in model.named_modules() if isinstance(module, QuantizedLinear)}
    assert changed == {site.name for site in plan.sites}
    for name, parameter in dense.named_parameters():
        if name.removesuffix(".weight") not in changed:
            assert torch.equal(model.get_parameter(name), parameter), name


def test_the_folder_holds_as_many_bytes_as_its_plan_says(int4: Path, factors: Path) -> None:
    for folder in (int4, factors):
        tensors = load_file(folder / "model.safetensors")
        plan = pared.Manifest.read(folder).plan
        assert sum(one.nbytes for one in tensors.values()) == plan.after.bytes_on_disk
        assert plan.after.bytes_on_disk < plan.before.bytes_on_disk


def test_it_is_saved_and_loaded_bit_for_bit(int4: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(int4)
    model.save_pretrained(tmp_path / "again")
    before, after = load_file(int4 / "model.safetensors"), load_file(tmp_path / "again" / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert torch.equal(logits(int4), pared.load(tmp_path / "again")(TOKENS).logits.detach())
    assert pared.verify(int4) == 0


def test_factors_are_rounded_both_and_come_close(factors: Path, place: Path, calibration: pared.Calibration) -> None:
    model = pared.load(factors)
    layers = [module for module in model.modules() if isinstance(module, LowRankLinear)]
    assert layers
    assert all(isinstance(one.up, QuantizedLinear) and isinstance(one.down, QuantizedLinear) for one in layers)
    whole = stored(place, "llama", "whole", calibration, method="svd-llm", keep=0.6, storage="factors")
    expected = logits(whole)
    assert float((logits(factors) - expected).norm() / expected.norm()) < 0.1


def test_transposed_layers_are_rounded_too(place: Path, calibration: pared.Calibration) -> None:
    folder = stored(place, "gpt2", "gpt2-int8", calibration, quantize="int8", rounding="nearest")
    expected = logits(place / "gpt2")
    assert float((logits(folder) - expected).norm() / expected.norm()) < 0.05


def test_feedback_comes_closer_to_the_dense_model_than_the_nearest(
    int4: Path, place: Path, calibration: pared.Calibration
) -> None:
    nearest = stored(place, "llama", "nearest", calibration, quantize="int4", rounding="nearest")
    dense = logits(place / "llama")
    assert float((logits(int4) - dense).norm()) < float((logits(nearest) - dense).norm())
    assert pared.Manifest.read(nearest).calibration is None  # no text was read


def test_a_dense_export_holds_the_weights_that_are_computed_with(int4: Path, tmp_path: Path) -> None:
    pared.export(int4, tmp_path / "dense")
    model, dense = pared.load(int4), pared.load(tmp_path / "dense")
    for name in module_map(model):
        assert torch.equal(dense.get_submodule(name).weight, model.get_submodule(name).weight)


def test_factors_in_few_bits_are_one_entry_of_the_map_and_export_dense(factors: Path, tmp_path: Path) -> None:
    """Regression: both factors had entries of their own beside their layer's, and the dense model has no such layer."""
    model = pared.load(factors)
    assert {entry["kind"] for entry in module_map(model).values()} == {"low_rank"}
    pared.export(factors, tmp_path / "dense")
    expected = logits(factors)
    assert float((logits(tmp_path / "dense") - expected).norm()) <= 1e-5 * float(expected.norm())


def test_pivots_are_converted_to_balanced_factors_of_few_bits(place: Path, calibration: pared.Calibration) -> None:
    folder = stored(place, "llama", "pivoted", calibration, method="svd", keep=0.6, storage="pivoted")
    manifest = pared.convert(folder, place / "pivoted-int8", quantize="int8")
    assert manifest.converted == "int8"
    assert manifest.perplexity_after is None
    kinds = {entry["kind"] for entry in module_map(pared.load(place / "pivoted-int8")).values()}
    assert kinds <= {"low_rank", "quantized"}
    expected = logits(folder)
    assert float((logits(place / "pivoted-int8") - expected).norm() / expected.norm()) < 0.1
    with pytest.raises(ParedError, match="in few bits"):
        pared.convert(place / "pivoted-int8", place / "again", quantize="int4")


# What is refused.


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"quantize": "int4", "storage": "pivoted", "keep": 0.5}, "not bear rounding"),
        ({"quantize": "int4", "method": "wanda", "sparsity": 0.5}, "does not take quantize"),
        ({"quantize": "int4", "method": "basis-sharing", "options": {"group_size": 2}}, "blocks share"),
    ],
)
def test_what_has_no_few_bits_is_refused_before_anything_is_read(fields: dict[str, object], said: str) -> None:
    with pytest.raises(ParedError, match=said):
        resolve(Recipe.of(fields))


def test_damaged_bytes_are_refused(factors: Path, tmp_path: Path) -> None:
    import shutil

    broken = tmp_path / "broken"
    shutil.copytree(factors, broken)
    tensors = load_file(broken / "model.safetensors")
    name = next(name for name in tensors if name.endswith(".codes"))
    tensors[name].view(-1)[0] = -128
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ParedError):
        pared.verify(broken)
    with pytest.raises(ParedError, match="expected -127 to 127"):
        pared.load(broken)
    del tensors[name]
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ParedError, match="missing"):
        require_tensors(broken)


def test_engines_refuse_few_bits_by_name(int4: Path, tmp_path: Path) -> None:
    with pytest.raises(ParedError, match="stored in 4 bits"):
        pared.export(int4, tmp_path / "file.gguf", to="gguf")
    entries = module_map(pared.load(int4))
    name = min(entries)
    with pytest.raises(UnsupportedError, match=f"{name}: stored in 4 bits"):
        members_of(name, 1, {}, entries, {})


def test_training_refuses_few_bits_by_name(int4: Path) -> None:
    from pared.training.trainable import unpack

    with pytest.raises(ParedError, match="stored in 4 bits and cannot be trained"):
        unpack(pared.load(int4))


# Bits in one budget with ranks.


def test_a_budget_of_bytes_is_kept_to_by_a_mixture(place: Path, calibration: pared.Calibration) -> None:
    folder = stored(place, "llama", "mixed", calibration, keep_bytes=0.3)
    plan = pared.Manifest.read(folder).plan
    forms = {site.decision.quantized for site in plan.sites}
    assert len(forms) > 1
    spent = sum(site.stored_bytes(plan.bytes_per_parameter) for site in plan.sites)
    dense = plan.before.covered_parameters * plan.bytes_per_parameter
    assert 0.25 < spent / dense <= 0.3
    assert plan.budget == "keep bytes 0.3"
    tensors = load_file(folder / "model.safetensors")
    assert sum(one.nbytes for one in tensors.values()) == plan.after.bytes_on_disk
    model = pared.load(folder)
    kinds = {name: entry.get("bits", 0) for name, entry in module_map(model).items()}
    named = {site.name: {"int8": 8, "int4": 4, None: 0}[site.decision.quantized] for site in plan.sites}
    assert {name: bits for name, bits in named.items() if bits} == {name: bits for name, bits in kinds.items() if bits}


def test_a_target_in_bytes_is_of_all_weights(place: Path, calibration: pared.Calibration) -> None:
    dense = pared.Manifest.read(stored(place, "llama", "for-sizes", calibration, quantize="int8")).plan
    wanted = int(0.6 * dense.before.bytes_on_disk)
    folder = stored(place, "llama", "target", calibration, target_bytes=str(wanted))
    assert 0.9 * wanted < pared.Manifest.read(folder).plan.after.bytes_on_disk <= wanted


def test_all_bytes_leave_the_model_as_it_is(place: Path, calibration: pared.Calibration) -> None:
    folder = stored(place, "llama", "all", calibration, keep_bytes=1.0)
    assert torch.equal(logits(folder), logits(place / "llama"))


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"keep_bytes": 0.3, "quantize": "int8"}, "decides the bits of every weight"),
        ({"keep_bytes": 0.3, "keep": 0.5}, "two budgets"),
        ({"keep_bytes": 0.3, "structures": "mixed"}, "take ranks"),
        ({"keep_bytes": 0.3, "allocation": "uniform"}, "decides bits"),
        ({"target_bytes": "much"}, "target_bytes"),
    ],
)
def test_what_a_budget_of_bytes_does_not_go_with_is_refused(fields: dict[str, object], said: str) -> None:
    with pytest.raises(ParedError, match=said):
        resolve(Recipe.of(fields))
