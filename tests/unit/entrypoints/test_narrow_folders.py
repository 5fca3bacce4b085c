"""What is done with a folder of narrower MLPs: reading, measuring, training, converting, adapting."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from narrow_folders import NARROW, Folders, narrow_folders
from peft import LoraConfig, PeftModel, get_peft_model
from tiers import quick_first
from tiny_models import TINY_MODELS, VOCAB
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedTokenizerFast

import pared
from pared.checkpoint import load, module_map, verify
from pared.modules import LowRankLinear, PivotedLinear
from pared.modules.narrow import Narrow
from pared.report.card import model_card
from pared.schema.manifest import Manifest
from pared.schema.plan import SitePlan
from pared.schema.width import Width
from unit.cli.test_commands import left_over, refused
from unit.cli.test_commands import pared as command

# Every kind in one family, and what differs by family (biases, Conv1D, a fused gate and up) in the others.
EVERY = [(kind, "llama") for kind in NARROW] + [("widths", family) for family in ("gpt2", "phi3", "opt")]
MLP = {"llama": ["gate_proj", "down_proj"], "gpt2": ["c_fc", "c_proj"], "phi3": ["gate_up_proj", "down_proj"],
       "opt": ["fc1", "fc2"]}  # fmt: skip
TOKENS = torch.randint(0, VOCAB, (2, 16), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(input_ids=TOKENS).logits


@pytest.fixture(scope="module")
def folder(
    tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast, calibration: pared.Calibration
) -> Folders:
    return narrow_folders(tmp_path_factory.mktemp("narrow"), tokenizer, calibration)


def tuned(folder: Path, out: Path, text_file: Path, **more: Any) -> Any:
    return pared.tune(
        folder, out=out, data=[f"file:{text_file}"], length=16, validation=4, batch=4, tokens=4 * 16 * 6,
        learning_rate=1e-2, **more,
    )  # fmt: skip


def decided(folder: Path) -> dict[str, SitePlan]:
    """Return the sites of a folder's plan that are not what they were."""
    return {site.name: site for site in Manifest.read(folder).plan.sites if site.decision.kind != "dense"}


def moved(before: Path, after: Path) -> set[str]:
    """Return the tensors that differ between two folders."""
    old, new = load(before).state_dict(), load(after).state_dict()
    assert old.keys() == new.keys()
    assert all(old[name].shape == value.shape for name, value in new.items())
    return {name for name, value in new.items() if not torch.equal(value, old[name])}


# Reading and measuring.


@pytest.mark.parametrize("kind", NARROW)
def test_a_narrow_folder_is_told_verified_and_measured(kind: str, folder: Folders, text_file: Path) -> None:
    code, told, err = command("info", folder(kind), "--full")
    assert code == 0, err
    widths = [site for site in decided(folder(kind)).values() if isinstance(site.decision, Width)]
    for site in widths:
        said, _, _ = str(site.decision).partition(",")  # a long one goes on in the next line
        assert site.name in told
        assert said in told
    assert widths
    for stream in ("on", "off"):
        code, told, err = command("verify", folder(kind), "--stream", stream)
        assert (code, "ok" in told) == (0, True), err
    code, told, err = command("eval", folder(kind), "--perplexity", f"file:{text_file}", "--length", 16, "--windows", 4)
    assert code == 0, err
    assert f"perplexity {Manifest.read(folder(kind)).perplexity_after:.4f}" in told


@pytest.mark.parametrize("kind", NARROW)
def test_a_narrow_model_read_block_by_block_is_the_one_made_in_memory(
    kind: str, folder: Folders, calibration: pared.Calibration, tmp_path: Path
) -> None:
    recipe = {"model": str(folder(kind).parent / "llama"), "out": str(tmp_path / "streamed"), "evaluation": None,
              "calibration": calibration, "stream": "on", **NARROW[kind]}  # fmt: skip
    pared.run(pared.Recipe.model_validate(recipe))
    assert moved(folder(kind), tmp_path / "streamed") == set()


# Training.


@pytest.mark.parametrize(
    ("method", "kind", "family"),
    quick_first(
        [
            ("full", "widths", "llama"),
            ("lora", "uniform", "llama"),
            ("distill", "mixed", "llama"),
            ("full", "mixed pivoted", "llama"),
            ("distill", "widths", "gpt2"),
            ("distill", "uniform", "phi3"),
        ],
        [(method, kind, "llama") for method in ("full", "lora", "distill") for kind in NARROW]
        + [("distill", kind, family) for kind in ("widths", "uniform") for family in ("gpt2", "phi3", "opt")],
    ),
)
def test_training_moves_what_was_made_smaller_and_keeps_how_it_is_stored(
    method: str, kind: str, family: str, folder: Folders, tmp_path: Path, text_file: Path
) -> None:
    before, after = folder(kind, family), tmp_path / "out"
    made = tuned(before, after, text_file, method=method)
    assert verify(after) <= 1e-6
    smaller, changed = decided(before).keys(), moved(before, after)
    of_site = {name: site for name in changed for site in smaller if name.startswith(f"{site}.")}
    assert set(of_site.values()) == smaller
    others = changed - of_site.keys()
    assert all("norm" in name or "ln_" in name for name in others)
    assert bool(others) == (method == "distill")  # which trains norms too
    assert module_map(load(after)) == module_map(load(before))
    assert made.manifest.plan == Manifest.read(before).plan
    configs = [json.loads((place / "config.json").read_text()) for place in (before, after)]
    assert configs[0].keys() == configs[1].keys()


def test_a_trained_model_of_uniform_widths_is_a_plain_folder_still(
    folder: Folders, tmp_path: Path, text_file: Path
) -> None:
    """Regression: training gave it a map of no modules, and a loader to read it with."""
    tuned(folder("uniform"), tmp_path / "out", text_file, method="distill")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert not {"quantization_config", "auto_map"} & config.keys()
    assert not (tmp_path / "out" / "modeling_pared.py").exists()
    assert "import pared" not in (tmp_path / "out" / "README.md").read_text()


def test_adapters_of_distillation_and_all_parameters_are_trained_too(
    folder: Folders, tmp_path: Path, text_file: Path
) -> None:
    for kind in ("widths", "uniform"):
        place = tmp_path / kind
        tuned(folder(kind), place, text_file, method="distill", options={"adapters": 4})
        assert moved(folder(kind), place) == {f"{site}.weight" for site in decided(folder(kind))}
        tuned(place, tmp_path / f"{kind}-all", text_file, method="full", options={"train": "all"})
        assert any("embed" in name for name in moved(place, tmp_path / f"{kind}-all"))


# Converting.


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize(("kind", "form"), [("mixed", "--pivot"), ("mixed pivoted", "--no-pivot")])
def test_ranks_beside_widths_are_stored_the_other_way(
    kind: str, form: str, family: str, folder: Folders, tmp_path: Path
) -> None:
    before, after = folder(kind, family), tmp_path / "out"
    code, _, err = command("convert", before, form, "--out", after)
    assert code == 0, err
    torch.testing.assert_close(logits(load(after)), logits(load(before)), atol=1e-4, rtol=1e-4)
    assert verify(after) < 1e-4
    old, new = (module_map(load(place)) for place in (before, after))
    narrow = {name: entry for name, entry in old.items() if entry["kind"].startswith("narrow")}
    ranked = {name for name, entry in old.items() if entry.get("narrow")}
    assert narrow or ranked
    assert {name: entry for name, entry in new.items() if entry["kind"].startswith("narrow")} == narrow
    assert {name for name, entry in new.items() if entry.get("narrow")} == ranked
    ranks = {type(layer) for layer in load(after).modules() if isinstance(layer, LowRankLinear | PivotedLinear)}
    assert ranks == {PivotedLinear if form == "--pivot" else LowRankLinear}
    plan = Manifest.read(after).plan
    assert sum(p.numel() for p in load(after).parameters()) == plan.after.model_parameters


@pytest.mark.parametrize(("kind", "family"), [one for one in EVERY if one[0] != "uniform"])
def test_as_dense_a_narrow_folder_is_a_plain_one_of_the_dense_sizes(
    kind: str, family: str, folder: Folders, tmp_path: Path
) -> None:
    code, _, err = command("convert", folder(kind, family), "--dense", "--out", tmp_path / "out")
    assert code == 0, err
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert module_map(plain) == {}
    shapes = {name: p.shape for name, p in TINY_MODELS[family]().named_parameters()}
    assert {name: p.shape for name, p in plain.named_parameters()} == shapes
    torch.testing.assert_close(logits(plain), logits(load(folder(kind, family))), atol=1e-4, rtol=1e-4)


def test_what_widths_have_no_other_form_of_is_told(folder: Folders, tmp_path: Path) -> None:
    """Regression: it said that all there is is pivoted, or two factors, where there was neither."""
    for form in ("--pivot", "--no-pivot"):
        refused(command("convert", folder("widths"), form, "--out", tmp_path / "out"), "changed layers are narrow",
                "have no factors or pivots", "--dense")  # fmt: skip
        refused(command("convert", folder("uniform"), form, "--out", tmp_path / "out"), "its weights are plain already")
    refused(command("convert", folder("uniform"), "--dense", "--out", tmp_path / "out"), "plain already")
    assert left_over(tmp_path) == []


# Adapters of PEFT.


@pytest.mark.parametrize(("kind", "family"), EVERY)
@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set")
def test_an_adapter_by_the_usual_names_trains_loads_merges_and_is_saved(
    kind: str, family: str, folder: Folders, tmp_path: Path
) -> None:
    before = load(folder(kind, family))
    adapted: Any = get_peft_model(load(folder(kind, family)), LoraConfig(r=2, target_modules=MLP[family]))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.2)
    adapted(input_ids=TOKENS, labels=TOKENS).loss.backward()
    torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=0.1).step()
    expected = logits(adapted.eval())
    assert (expected - logits(before)).norm() > 1e-3 * expected.norm()
    with adapted.disable_adapter():
        assert torch.equal(logits(adapted), logits(before))
    adapted.save_pretrained(tmp_path / "adapter")
    again: Any = PeftModel.from_pretrained(load(folder(kind, family)), tmp_path / "adapter")
    torch.testing.assert_close(logits(again.eval()), expected, atol=1e-5, rtol=1e-4)
    again.merge_adapter()
    again.unmerge_adapter()
    torch.testing.assert_close(logits(again), expected, atol=1e-4, rtol=1e-4)
    merged = again.merge_and_unload()
    torch.testing.assert_close(logits(merged), expected, atol=1e-4, rtol=1e-4)
    merged.save_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(load(tmp_path / "merged")), expected, atol=1e-4, rtol=1e-4)
    narrow = [name for name, layer in before.named_modules() if isinstance(layer, Narrow)]
    assert [name for name, layer in load(tmp_path / "merged").named_modules() if isinstance(layer, Narrow)] == narrow


# The card.


def test_the_card_of_a_plain_encoder_names_the_class_that_loads_it(folder: Folders) -> None:
    manifest = Manifest.read(folder("uniform"))
    loads: Callable[[str], str] = lambda own: model_card(manifest, "here", {"architectures": [own]})  # noqa: E731
    assert f"model = {AutoModelForSequenceClassification.__name__}." in loads("BertForSequenceClassification")
    assert f"model = {AutoModelForCausalLM.__name__}." in loads("GPT2LMHeadModel")
