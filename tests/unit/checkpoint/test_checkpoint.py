import ast
import copy
import json
import logging
import pickle
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import processes
import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from saved_models import Saved, saved_once
from tiny_models import FAMILIES, TINY_MODELS, VOCAB
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING

import pared
from pared import ParedError, Recipe
from pared.checkpoint import is_compressed, mark, module_map, read_config, record, require_tensors
from pared.checkpoint.format import ParedConfig
from pared.checkpoint.portable import PortableMixin
from pared.entrypoints.export import export_dense, make_dense
from pared.modules import LowRankLinear

TOKENS = torch.randint(0, VOCAB, (2, 16), generator=torch.Generator().manual_seed(1))
Edit = Callable[[dict[str, Any]], None]


@torch.no_grad()
def logits(model: PreTrainedModel) -> torch.Tensor:
    return model(input_ids=TOKENS.to(model.device)).logits


def auto_class(family: str) -> Any:
    return transformers.AutoModelForSequenceClassification if family == "bert" else AutoModelForCausalLM


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Saved:
    """A family's compressed folder, and what the model in memory answered; made once."""

    def make(family: str) -> PreTrainedModel:
        model = TINY_MODELS[family]()
        pared.compress(model, tokenizer, Recipe(method="svd", keep=0.6))
        return model

    return saved_once(make, logits, tmp_path_factory, tokenizer)


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    """The folder of a whole job, with its manifest."""
    place = tmp_path_factory.mktemp("job")
    TINY_MODELS["llama"]().save_pretrained(place / "dense")
    tokenizer.save_pretrained(place / "dense")
    recipe = Recipe(model=str(place / "dense"), out=str(place / "out"), method="svd", keep=0.6, evaluation=None)
    return pared.run(recipe).folder


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    """A copy of it that a test may damage."""
    return Path(shutil.copytree(whole, tmp_path / "copy"))


def change_config(folder: Path, edit: Edit) -> None:
    path = folder / "config.json"
    fields = json.loads(path.read_text())
    edit(fields["quantization_config"])
    path.write_text(json.dumps(fields))


# A folder is an ordinary Hugging Face checkpoint.


@pytest.mark.parametrize("family", FAMILIES)
def test_plain_transformers_loads_the_very_model_that_was_saved(
    family: str, saved: Callable[[str], tuple[Path, torch.Tensor]]
) -> None:
    folder, expected = saved(family)
    model = auto_class(family).from_pretrained(folder)
    assert type(model).__name__ == type(TINY_MODELS[family]()).__name__
    assert any(isinstance(module, LowRankLinear) for module in model.modules())
    assert (logits(model) - expected).abs().max() == 0.0


@pytest.mark.parametrize("family", FAMILIES)
def test_a_loaded_model_can_be_saved_again(
    family: str, saved: Callable[[str], tuple[Path, torch.Tensor]], tmp_path: Path
) -> None:
    folder, expected = saved(family)
    auto_class(family).from_pretrained(folder).save_pretrained(tmp_path)
    assert (logits(auto_class(family).from_pretrained(tmp_path)) - expected).abs().max() == 0.0
    for name in ("config.json", "modeling_pared.py", "model.safetensors"):
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()


@pytest.mark.parametrize("family", FAMILIES)
def test_factors_are_stored_as_down_and_up(family: str, saved: Callable[[str], tuple[Path, torch.Tensor]]) -> None:
    folder, _ = saved(family)
    modules = read_config(str(folder)).quantization_config["modules"]
    stored = load_file(folder / "model.safetensors")
    assert modules
    told = ParedConfig(**read_config(str(folder)).quantization_config).guard
    assert told is not None
    guard, notice = stored.pop(told), stored.pop("import_pared_or_trust_remote_code")
    assert guard.numel() == notice.numel() == 0
    for name, entry in modules.items():
        assert tuple(stored[f"{name}.down.weight"].shape) == (entry["rank"], entry["in_features"])
        assert tuple(stored[f"{name}.up.weight"].shape) == (entry["out_features"], entry["rank"])
        assert (f"{name}.up.bias" in stored) == entry["bias"]
        assert f"{name}.weight" not in stored
        assert f"{name}.bias" not in stored


@pytest.mark.parametrize("family", FAMILIES)
def test_the_map_names_every_module_with_its_exact_rank(
    family: str, saved: Callable[[str], tuple[Path, torch.Tensor]]
) -> None:
    folder, _ = saved(family)
    fields = json.loads((folder / "config.json").read_text())["quantization_config"]
    mixture = {"experts"} if family == "qwen2_moe" else set()
    assert fields.keys() == {"quant_method", "format_version", "modules"} | mixture
    assert (fields["quant_method"], fields["format_version"]) == ("pared", 1)
    assert fields["modules"] == module_map(auto_class(family).from_pretrained(folder))


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "bert"])
def test_the_body_alone_loads_from_a_folder_with_a_head(
    family: str, saved: Callable[[str], tuple[Path, torch.Tensor]]
) -> None:
    folder, _ = saved(family)
    body, info = AutoModel.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert any(isinstance(module, LowRankLinear) for module in body.modules())
    whole = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        assert torch.equal(body(TOKENS)[0], whole.base_model(TOKENS)[0])


def test_a_body_saved_alone_loads_again(saved: Callable[[str], tuple[Path, torch.Tensor]], tmp_path: Path) -> None:
    body = AutoModel.from_pretrained(saved("llama")[0])
    body.save_pretrained(tmp_path)
    again = pared.load(str(tmp_path))
    with torch.no_grad():
        assert torch.equal(body(TOKENS)[0], again(TOKENS)[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_every_dtype_comes_back_as_it_was(
    dtype: torch.dtype, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    TINY_MODELS["qwen2"]().save_pretrained(tmp_path / "dense")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=dtype)
    pared.compress(model, tokenizer, Recipe(method="svd", keep=0.6))
    model.save_pretrained(tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert {parameter.dtype for parameter in loaded.parameters()} == {dtype}
    assert torch.equal(logits(loaded), logits(model))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_folder_loads_in_another_dtype(dtype: torch.dtype, saved: Callable[[str], tuple[Path, torch.Tensor]]) -> None:
    folder, expected = saved("llama")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert (logits(model).float() - expected).norm() < 0.05 * expected.norm()


def test_device_map_cpu_loads_the_same_model(saved: Callable[[str], tuple[Path, torch.Tensor]]) -> None:
    folder, expected = saved("llama")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(folder, device_map="cpu")), expected)


def test_sharded_weights_load_and_pass_the_check(
    saved: Callable[[str], tuple[Path, torch.Tensor]], tmp_path: Path
) -> None:
    folder, expected = saved("llama")
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert require_tensors(tmp_path) > 0
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), expected)


def test_tied_embeddings_stay_tied(saved: Callable[[str], tuple[Path, torch.Tensor]]) -> None:
    folder, _ = saved("qwen3")
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_half_and_float_work_on_a_loaded_model(saved: Callable[[str], tuple[Path, torch.Tensor]]) -> None:
    folder, expected = saved("llama")
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert {parameter.dtype for parameter in model.half().parameters()} == {torch.float16}
    assert (logits(model.float()) - expected).norm() < 0.01 * expected.norm()


def test_a_loaded_model_can_be_copied_and_pickled(saved: Callable[[str], tuple[Path, torch.Tensor]]) -> None:
    folder, expected = saved("llama")
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(logits(copy.deepcopy(model)), expected)
    assert torch.equal(logits(pickle.loads(pickle.dumps(model))), expected)


def test_a_loaded_model_generates(saved: Callable[[str], tuple[Path, torch.Tensor]]) -> None:
    model = pared.load(str(saved("llama")[0]))
    made = model.generate(TOKENS, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    assert made.shape == (2, 19)


# Training.


def test_lora_on_up_trains_a_step_and_merges_exactly(saved: Callable[[str], tuple[Path, torch.Tensor]]) -> None:
    from peft import LoraConfig, get_peft_model

    folder, before = saved("llama")
    base = AutoModelForCausalLM.from_pretrained(folder)
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["up"], lora_dropout=0.0))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    for _ in range(2):  # the first step only moves B away from zero
        model(input_ids=TOKENS, labels=TOKENS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    trained = logits(model)
    assert not torch.allclose(trained, before, atol=1e-3)
    merged = model.merge_and_unload()
    assert sum(isinstance(module, LowRankLinear) for module in merged.modules()) == 21
    assert float((logits(merged) - trained).abs().max()) < 1e-4 * float(trained.abs().max())  # float32, two blocks


def test_a_merged_model_saves_and_loads(saved: Callable[[str], tuple[Path, torch.Tensor]], tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    base = AutoModelForCausalLM.from_pretrained(saved("llama")[0])
    config = LoraConfig(r=2, target_modules=["up"], init_lora_weights=False)
    merged = get_peft_model(base, config).merge_and_unload().eval()
    merged.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(merged))
    assert not torch.allclose(logits(merged), saved("llama")[1], atol=1e-3)


def test_trainer_trains_a_loaded_model_without_adapters(
    saved: Callable[[str], tuple[Path, torch.Tensor]], tmp_path: Path
) -> None:
    folder, before = saved("llama")
    model = AutoModelForCausalLM.from_pretrained(folder)
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), max_steps=1, learning_rate=1e-2, report_to=[], use_cpu=True, disable_tqdm=True
    )
    rows = [{"input_ids": row, "labels": row} for row in TOKENS]
    trainer = transformers.Trainer(model=model, args=arguments, train_dataset=rows)
    assert trainer.train().global_step == 1
    trainer.save_model(str(tmp_path / "trained"))
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "trained")
    assert torch.equal(logits(again), logits(model.eval()))
    assert not torch.allclose(logits(again), before, atol=1e-4)


# Other processes, with and without the package.

LOAD = """
import sys, torch
sys.modules.update({blocked})
{imports}
from transformers import AutoModelForCausalLM
tokens = torch.load({tokens!r})
def answer(folder, out, again=None):
    model = AutoModelForCausalLM.from_pretrained(folder{arguments})
    with torch.no_grad():
        torch.save(model(input_ids=tokens).logits, out)
    if again:
        model.save_pretrained(again)
torch.set_num_threads(1)
answer({folder!r}, {out!r} + ".first", {out!r} + ".folder")
answer({out!r} + ".folder", {out!r} + ".second")
"""
MEET = """
from pathlib import Path
del sys.modules["pared"]
import pared
from pared.checkpoint import module_map
from pared.entrypoints.export import export_dense
assert len(module_map(pared.load({folder!r}))) == 21, "the package does not know the modules of the folder's copy"
export_dense({folder!r}, Path({out!r} + ".dense"))
answer_of = AutoModelForCausalLM.from_pretrained({out!r} + ".dense")
with torch.no_grad():
    torch.save(answer_of(input_ids=tokens).logits, {out!r} + ".third")
"""


def run_python(script: str, place: Path, folder: Path, **fields: str) -> Path:
    torch.save(TOKENS, place / "tokens.pt")
    out = str(place / "out")
    source = script.format(tokens=str(place / "tokens.pt"), folder=str(folder), out=out, **fields)
    processes.run_python(source, place)
    return place


def test_a_fresh_process_needs_only_import_pared(
    saved: Callable[[str], tuple[Path, torch.Tensor]], tmp_path: Path
) -> None:
    folder, expected = saved("llama")
    run_python(LOAD, tmp_path, folder, blocked="{}", imports="import pared", arguments="")
    assert torch.equal(torch.load(tmp_path / "out.first"), expected)
    assert torch.equal(torch.load(tmp_path / "out.second"), expected)


@pytest.fixture(scope="module")
def without_pared(saved: Callable[[str], tuple[Path, torch.Tensor]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a process answered that could not import pared, until the end, when it could."""
    blocked = "dict(pared=None)"
    arguments = ", trust_remote_code=True"
    place = tmp_path_factory.mktemp("without")
    return run_python(LOAD + MEET, place, saved("llama")[0], blocked=blocked, imports="", arguments=arguments)


def test_a_machine_without_pared_loads_the_same_model(
    without_pared: Path, saved: Callable[[str], tuple[Path, torch.Tensor]]
) -> None:
    assert torch.equal(torch.load(without_pared / "out.first"), saved("llama")[1])


def test_a_machine_without_pared_saves_a_folder_that_loads_there_again(
    without_pared: Path, saved: Callable[[str], tuple[Path, torch.Tensor]]
) -> None:
    assert torch.equal(torch.load(without_pared / "out.second"), saved("llama")[1])
    copied = without_pared / "out.folder" / "modeling_pared.py"
    assert copied.read_bytes() == (saved("llama")[0] / "modeling_pared.py").read_bytes()


def test_pared_imported_after_a_folders_own_loader_takes_over(
    without_pared: Path, saved: Callable[[str], tuple[Path, torch.Tensor]]
) -> None:
    """Regression: the folder's copy stayed registered, and an export to dense kept the factors without a map."""
    torch.testing.assert_close(torch.load(without_pared / "out.third"), saved("llama")[1], atol=1e-5, rtol=1e-5)


def test_trust_remote_code_beside_the_package_keeps_the_folder_portable(
    saved: Callable[[str], tuple[Path, torch.Tensor]], tmp_path: Path
) -> None:
    """Regression: the saved ``auto_map`` named the package's own ``loader.py``."""
    folder, expected = saved("llama")
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    assert torch.equal(logits(model), expected)
    model.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "config.json").read_bytes() == (folder / "config.json").read_bytes()
    assert {path.name for path in (tmp_path / "again").glob("*.py")} == {"modeling_pared.py"}
    assert torch.equal(
        logits(AutoModelForCausalLM.from_pretrained(tmp_path / "again", trust_remote_code=True)), expected
    )


def test_a_model_loaded_with_trust_remote_code_can_be_made_dense(
    saved: Callable[[str], tuple[Path, torch.Tensor]], tmp_path: Path
) -> None:
    folder, expected = saved("llama")
    make_dense(AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)).save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*.py"))
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), expected, atol=1e-5, rtol=1e-5)


def test_the_loader_of_a_folder_needs_nothing_of_pared(saved: Callable[[str], tuple[Path, torch.Tensor]]) -> None:
    source = (saved("llama")[0] / "modeling_pared.py").read_text()
    imported = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            imported |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(str(node.module).partition(".")[0])
    assert imported - sys.stdlib_module_names <= {"numpy", "torch", "transformers"}


# The check of a folder.


def test_a_whole_folder_passes_with_difference_zero(whole: Path) -> None:
    assert pared.verify(whole) <= 1e-6


@pytest.fixture
def _transformers_without_pared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(AUTO_QUANTIZER_MAPPING, "pared")
    monkeypatch.delitem(AUTO_QUANTIZATION_CONFIG_MAPPING, "pared")


@pytest.mark.usefixtures("_transformers_without_pared")
def test_a_load_without_pared_is_refused_and_says_what_to_do(whole: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Trap 1: transformers only warns of an unknown quant_method, then fills in random weights."""
    transformers.utils.logging.enable_propagation()
    with caplog.at_level(logging.WARNING, "transformers"), pytest.raises(RuntimeError, match="mismatched_sizes"):
        AutoModelForCausalLM.from_pretrained(whole)
    transformers.utils.logging.disable_propagation()
    assert "import_pared_or_trust_remote_code" in caplog.text


@pytest.mark.usefixtures("_transformers_without_pared")
def test_random_weights_that_a_load_without_pared_was_told_to_make_do_not_pass(whole: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(whole, ignore_mismatched_sizes=True)
    manifest = pared.schema.manifest.Manifest.read(whole)
    with pytest.raises(ParedError, match=r"self-check failed.*differ"):
        pared.checkpoint.compare(model, manifest.fingerprint)


@pytest.mark.usefixtures("_transformers_without_pared")
def test_pared_itself_never_hands_out_random_weights(folder: Path) -> None:
    with pytest.raises(ParedError, match="ignore_mismatched_sizes"):
        pared.load(str(folder))
    tensors = load_file(folder / "model.safetensors")
    save_file({key: one for key, one in tensors.items() if one.numel()}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ParedError, match="weights are missing"):
        pared.load(str(folder))


def test_a_changed_weight_does_not_pass(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.up.weight"] *= 1.5
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ParedError, match=r"model\.safetensors is not what was written"):
        pared.verify(folder)
    record(folder)
    with pytest.raises(ParedError, match="self-check failed"):
        pared.verify(folder)


def test_weights_that_are_no_numbers_do_not_pass(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][0] = float("nan")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    record(folder)
    for read in (pared.verify, pared.load):
        with pytest.raises(ParedError, match=r"model\.norm\.weight holds NaN or infinity in 1 of 32 values"):
            read(folder)


@pytest.mark.parametrize("length", [0, 4, 100, 5000, -1])
def test_truncated_weights_are_refused_by_file(folder: Path, length: int) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(ParedError, match=r"model\.safetensors: unreadable or truncated"):
        pared.verify(folder)
    with pytest.raises(ParedError, match=r"copy': unreadable or truncated checkpoint"):
        pared.load(str(folder))


def test_a_folder_without_weights_is_refused(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(ParedError, match=r"has no \.safetensors file"):
        pared.verify(folder)


def test_a_missing_shard_is_refused_by_tensor(folder: Path) -> None:
    model = pared.load(str(folder))
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="20KB")
    sorted(folder.glob("model-*.safetensors"))[1].unlink()
    with pytest.raises(ParedError, match=r"model\.layers\.\d.*weight is missing, the map says \(\d+, \d+\)"):
        pared.verify(folder)


@pytest.mark.parametrize("factor", ["down", "up"])
def test_a_missing_tensor_is_refused_by_name(folder: Path, factor: str) -> None:
    tensors = load_file(folder / "model.safetensors")
    name = f"model.layers.2.self_attn.v_proj.{factor}.weight"
    del tensors[name]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ParedError, match=rf"{name} is missing"):
        pared.verify(folder)
    with pytest.raises(ParedError, match=rf"1 weights are missing from the checkpoint, the first is '{name}'"):
        pared.load(str(folder))


def test_a_wrong_rank_in_the_map_is_refused_by_tensor(folder: Path) -> None:
    change_config(folder, lambda fields: fields["modules"]["model.layers.1.mlp.up_proj"].update(rank=3))
    with pytest.raises(ParedError, match=r"model\.layers\.1\.mlp\.up_proj\.down\.weight is \(\d+, 32\).*\(3, 32\)"):
        pared.verify(folder)
    with pytest.raises(ParedError, match="unreadable or truncated"):
        pared.load(str(folder))


def test_a_stored_tensor_that_is_taken_as_it_is_must_have_the_shape_of_the_map(folder: Path) -> None:
    """What transformers 5.19 makes of a wrong rank: it puts a stored tensor in, whatever its shape."""
    model = pared.load(str(folder))
    layer = model.get_submodule("model.layers.1.mlp.up_proj")
    layer.rank -= 1
    quantizer = model.hf_quantizer
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.up_proj\.down\.weight is .* the map says"):
        quantizer._process_model_after_weight_loading(model)


def test_a_wrong_shape_in_the_map_is_refused_by_module(folder: Path) -> None:
    change_config(folder, lambda fields: fields["modules"]["model.layers.1.mlp.up_proj"].update(in_features=31))
    with pytest.raises(ParedError, match=r"map entry model\.layers\.1\.mlp\.up_proj: shape \[32, 48\] in the model"):
        pared.load(str(folder))
    with pytest.raises(ParedError, match=r"model\.layers\.1\.mlp\.up_proj\.down\.weight"):
        pared.verify(folder)


def test_a_module_that_is_not_in_the_model_is_refused_by_name(folder: Path) -> None:
    def rename(fields: dict[str, Any]) -> None:
        fields["modules"]["model.layers.9.mlp.up_proj"] = fields["modules"].pop("model.layers.1.mlp.up_proj")

    change_config(folder, rename)
    with pytest.raises(ParedError, match=r"map entry model\.layers\.9\.mlp\.up_proj: LlamaForCausalLM has no such"):
        pared.load(str(folder))


@pytest.mark.parametrize(
    "edit",
    [
        pytest.param(lambda entry: entry.update(kind="telepathy"), id="unknown kind"),
        pytest.param(lambda entry: entry.pop("kind"), id="no kind"),
        pytest.param(lambda entry: entry.pop("rank"), id="no rank"),
        pytest.param(lambda entry: entry.update(pivots=[1]), id="unknown key"),
    ],
)
def test_a_malformed_map_entry_is_refused_by_name(folder: Path, edit: Edit) -> None:
    change_config(folder, lambda fields: edit(fields["modules"]["model.layers.0.mlp.up_proj"]))
    for check in (pared.load, lambda name: pared.verify(Path(name))):
        with pytest.raises(ParedError, match=r"map entry model\.layers\.0\.mlp\.up_proj"):
            check(str(folder))


@pytest.mark.parametrize("modules", [None, ["a"], "a", {"model.layers.0.mlp.up_proj": 3}])
def test_a_map_that_is_no_map_is_refused(folder: Path, modules: object) -> None:
    change_config(folder, lambda fields: fields.update(modules=modules))
    with pytest.raises(ParedError, match="copy"):
        pared.verify(folder)


def test_a_newer_format_is_refused_by_version(folder: Path) -> None:
    change_config(folder, lambda fields: fields.update(format_version=2))
    for check in (pared.load, lambda name: pared.verify(Path(name))):
        with pytest.raises(ParedError, match="format version 2; this loader reads version 1: update pared"):
            check(str(folder))
    with pytest.raises(ValueError, match="update pared"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_an_unknown_key_of_the_format_is_refused_by_name(folder: Path) -> None:
    change_config(folder, lambda fields: fields.update(shared_bases={}))
    for check in (pared.load, lambda name: pared.verify(Path(name))):
        with pytest.raises(ParedError, match=r"unknown keys \['shared_bases'\]"):
            check(str(folder))


def test_a_folder_without_manifest_is_refused_but_loads(folder: Path) -> None:
    (folder / "pared.json").unlink()
    with pytest.raises(ParedError, match=r"copy has no pared\.json"):
        pared.verify(folder)
    assert isinstance(pared.load(str(folder)), PreTrainedModel)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", r"pared\.json: not JSON"),
        ("\udcff", r"pared\.json: not JSON"),
        ("[]", r"pared\.json: got \[\], expected a manifest"),
        ('{"telepathy": 1}', r"pared\.json: format_version is None"),
        ('{"format_version": true}', r"pared\.json: format_version is True"),
        ('{"format_version": 1, "format_version": 1}', r"pared\.json: .*'format_version' stands there twice"),
        ('{"format_version": ' + "9" * 6000 + "}", r"pared\.json: .*a number of 6,000 digits"),
        ("[" * 5000 + "]" * 5000, r"pared\.json: .*nested too deeply"),
    ],
)
def test_a_damaged_manifest_is_refused_by_name(folder: Path, content: str, message: str) -> None:
    (folder / "pared.json").write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(ParedError, match=message):
        pared.verify(folder)


def test_a_damaged_config_is_refused(folder: Path) -> None:
    (folder / "config.json").write_text("{")
    with pytest.raises(ParedError, match=r"copy': no readable config\.json"):
        pared.verify(folder)


def test_a_dense_folder_is_no_folder_of_pared(whole: Path) -> None:
    dense = whole.parent / "dense"
    assert is_compressed(read_config(str(whole)))
    assert not is_compressed(read_config(str(dense)))
    with pytest.raises(ParedError, match=r"dense has no pared\.json"):
        pared.verify(dense)


def test_a_config_can_be_read_back() -> None:
    entry = {"kind": "low_rank", "in_features": 4, "out_features": 3, "rank": 1, "bias": False}
    config = ParedConfig(modules={"a": entry})
    assert ParedConfig(**config.to_dict()).to_dict() == config.to_dict()


# Out again: dense folders.


@pytest.mark.parametrize("family", FAMILIES)
def test_a_dense_export_answers_as_the_compressed_model_and_knows_nothing_of_pared(
    family: str, saved: Callable[[str], tuple[Path, torch.Tensor]], tmp_path: Path
) -> None:
    folder, expected = saved(family)
    size = export_dense(str(folder), tmp_path / "dense").bytes_on_disk
    assert size == (tmp_path / "dense" / "model.safetensors").stat().st_size
    config = json.loads((tmp_path / "dense" / "config.json").read_text())
    assert config.keys().isdisjoint({"quantization_config", "auto_map"})
    assert not list((tmp_path / "dense").glob("*.py"))
    with safe_open(tmp_path / "dense" / "model.safetensors", framework="pt") as tensors:
        assert not [name for name in tensors.keys() if ".down.weight" in name or ".up.weight" in name]  # noqa: SIM118
    model, info = auto_class(family).from_pretrained(tmp_path / "dense", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not any(isinstance(module, (LowRankLinear, PortableMixin)) for module in model.modules())
    torch.testing.assert_close(logits(model), expected, atol=1e-5, rtol=1e-5)


def test_a_dense_export_brings_conv1d_back(saved: Callable[[str], tuple[Path, torch.Tensor]], tmp_path: Path) -> None:
    export_dense(str(saved("gpt2")[0]), tmp_path / "dense")
    exported = load_file(tmp_path / "dense" / "model.safetensors")
    native = TINY_MODELS["gpt2"]().state_dict()
    assert exported["transformer.h.0.attn.c_attn.weight"].shape == native["transformer.h.0.attn.c_attn.weight"].shape
    assert native["transformer.h.0.attn.c_attn.weight"].shape == (32, 96)


def test_a_dense_export_can_be_compressed_again(whole: Path, tmp_path: Path) -> None:
    export_dense(str(whole), tmp_path / "dense")
    out = tmp_path / "again"
    recipe = Recipe(model=str(tmp_path / "dense"), out=str(out), method="svd", keep=0.6, evaluation=None)
    outcome = pared.run(recipe)
    assert outcome.manifest.self_check <= 1e-6
    torch.testing.assert_close(logits(pared.load(str(out))), logits(pared.load(str(whole))), atol=1e-4, rtol=1e-4)


def test_a_marked_model_in_memory_can_be_made_dense() -> None:
    model = TINY_MODELS["llama"]()
    before = logits(model)
    mark(model)
    assert torch.equal(logits(make_dense(model)), before)
    assert type(model) is transformers.LlamaForCausalLM


def test_an_export_does_not_replace_a_folder_unasked(whole: Path, tmp_path: Path) -> None:
    (tmp_path / "kept").write_text("mine")
    with pytest.raises(ParedError, match="is there already; name another or pass overwrite=True"):
        export_dense(str(whole), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


def test_a_compressed_folder_is_refused_as_input(whole: Path, tmp_path: Path) -> None:
    recipe = Recipe(model=str(whole), out=str(tmp_path / "out"), method="svd", evaluation=None)
    with pytest.raises(ParedError, match="already compressed by pared"):
        pared.run(recipe)
    assert not (tmp_path / "out").exists()
