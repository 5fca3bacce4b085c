"""A protocol by name is what its file says, what is given beside it wins, and every deviation is told."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import TINY_MODELS
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

import pared
from pared import ParedError, Recipe
from pared.checkpoint import Manifest
from pared.cli.main import app
from pared.engine.asked import method_of, options_of, settled
from pared.engine.progress import Silent
from pared.presets import (
    DEMO,
    FromPreset,
    flatten,
    load_preset,
    preset_names,
    read_preset,
    record_of,
    require_user_fields,
    summary_of,
    to_markdown,
)
from pared.sources.windows import cut
from pared.training.methods import METHODS
from pared.tuning import Tuning

DOCS = Path(__file__).parents[2] / "docs"
PROTOCOLS = [name for name in preset_names() if name != DEMO]
RECIPES = [name for name in preset_names() if load_preset(name).command == "compress"]
TUNINGS = [name for name in preset_names() if load_preset(name).command == "tune"]


def begun(name: str, **more: Any) -> FromPreset:
    return (Recipe if name in RECIPES else Tuning).of({"preset": name, **more})


def test_all_protocols_of_the_papers_are_there() -> None:
    assert {"basis-sharing-lora", "basis-sharing-full", "svd-llm-lora", "basel-math", "basel-code", "basel-lm",
            "fwsvd-glue"} == set(TUNINGS)  # fmt: skip
    assert {"basis-sharing-paper", "svd-llm-paper", "fwsvd-paper", "asvd-paper", "wanda-paper", "sparsegpt-paper",
            "dsa-paper", DEMO} == set(RECIPES)  # fmt: skip


@pytest.mark.parametrize("name", preset_names())
def test_a_preset_alone_deviates_in_nothing_and_every_field_is_of_the_schema(name: str) -> None:
    asked = begun(name)
    assert asked.deviations() == {}
    dumped = dict(flatten(asked.model_dump(mode="json")))
    for field, value in flatten(load_preset(name).fields):
        assert dumped[field] == value, field
    assert type(asked).model_validate(asked.model_dump()) == asked


@pytest.mark.parametrize("name", RECIPES)
def test_the_recipe_of_a_model_card_is_the_same_recipe(name: str) -> None:
    asked = begun(name, calibration={"text": "file:x.txt", "samples": 3})
    left_out = {"out", "keep"} if asked.rank_fraction else {"out"}  # as report/card.py has it
    shown = asked.model_dump(mode="json", exclude=left_out, exclude_none=True)
    assert Recipe.of(shown) == asked


@pytest.mark.parametrize("name", PROTOCOLS)
def test_every_field_of_a_protocol_says_what_the_paper_says_and_where(name: str) -> None:
    preset = load_preset(name)
    assert preset.source
    assert set(dict(flatten(preset.fields))) == set(preset.paper)
    assert all(setting.where for setting in preset.paper.values())


@pytest.mark.parametrize("name", RECIPES)
def test_options_of_a_recipe_are_those_its_method_and_allocation_have(name: str) -> None:
    recipe = begun(name)
    assert isinstance(recipe, Recipe)
    assert options_of(recipe) == {**method_of(recipe).options, **recipe.options}
    assert settled(recipe)


@pytest.mark.parametrize("name", TUNINGS)
def test_a_training_preset_spells_every_option_of_its_method(name: str) -> None:
    """A default of ours that changes must not change a protocol."""
    tuning = begun(name)
    method = METHODS[tuning.method]
    assert tuning.options.keys() == method.options.keys()
    assert {key: type(value) for key, value in tuning.options.items()} == {
        key: type(value) for key, value in method.options.items()
    }
    method.check(tuning.options)


def test_the_page_is_what_the_files_say() -> None:
    """Made anew by: pared presets --markdown > docs/presets.md."""
    assert (DOCS / "presets.md").read_text(encoding="utf-8") == to_markdown()


def test_settings_that_reviews_ask_about_are_the_papers() -> None:
    lora, full = begun("basis-sharing-lora"), begun("basis-sharing-full")
    assert (lora.options["rank"], lora.options["alpha"], lora.learning_rate, lora.epochs) == (8, 32, 1e-4, 2)
    assert (lora.options["targets"], lora.batch, lora.length) == ("peft", 1, 2048)
    assert (full.options["train"], full.learning_rate, full.clip) == ("all", 2e-6, 0.01)
    assert (full.weight_decay, full.accumulation, full.batch) == (1e-3, 8, 1)
    glue = begun("fwsvd-glue")
    assert (glue.learning_rate, glue.batch, glue.epochs, glue.schedule) == (2e-5, 32, 3, "linear")
    math, plain = begun("basel-math"), begun("basel-lm")
    assert (math.options["pruning_epochs"], plain.options["pruning_epochs"]) == (2.0, 1.0)
    assert (math.template, math.batch * math.accumulation, math.length) == ("basel", 128, 512)
    paper = begun("basis-sharing-paper")
    assert (paper.calibration.samples, paper.calibration.length, paper.calibration.seed) == (256, 2048, 2023)
    assert (begun("fwsvd-paper").rank_fraction, begun("fwsvd-paper").calibration.samples) == (0.33, None)
    assert begun("svd-llm-paper").calibration.seed == 3


# What is given beside a preset.


def test_what_is_given_wins_and_is_told_and_the_rest_stays() -> None:
    asked = begun("basis-sharing-lora", batch=4, options={"rank": 16}, model="m", out="o", device="cpu")
    assert (asked.batch, asked.options["rank"], asked.options["alpha"], asked.epochs) == (4, 16, 32, 2.0)
    assert asked.deviations() == {
        "batch": {"preset": 1, "given": 4},
        "options.rank": {"preset": 8, "given": 16},
    }
    assert (
        summary_of(record_of(asked))
        == "preset basis-sharing-lora, changed: batch 4 (preset: 1); options.rank 16 (preset: 8)"
    )
    assert summary_of(record_of(begun("basis-sharing-lora"))) == "preset basis-sharing-lora, unchanged"


def test_a_field_the_preset_says_nothing_of_is_a_deviation_too() -> None:
    skipping = begun("basis-sharing-paper", skip=["*.0.*"])
    assert skipping.deviations() == {"skip": {"preset": [], "given": ["*.0.*"]}}
    assert "windows" in begun("basis-sharing-full", windows=100).deviations()


def test_one_of_two_budgets_or_lengths_replaces_the_presets() -> None:
    asked = begun("fwsvd-paper", keep=0.5)
    assert (asked.keep, asked.rank_fraction) == (0.5, None)
    assert asked.deviations() == {
        "keep": {"preset": None, "given": 0.5},
        "rank_fraction": {"preset": 0.33, "given": None},
    }
    pattern = begun("wanda-paper", pattern="2:4")
    assert (pattern.sparsity, pattern.pattern) == (None, "2:4")
    short = begun("svd-llm-lora", tokens=1000)
    assert (short.tokens, short.epochs) == (1000, None)


@pytest.mark.parametrize(
    ("kind", "fields", "message"),
    [
        (Recipe, {"preset": "basis-sharing-papr"}, "unknown preset 'basis-sharing-papr'; did you mean"),
        (Recipe, {"preset": "basel-lm"}, "preset 'basel-lm' is for pared tune; for pared compress there are: asvd"),
        (Tuning, {"preset": "wanda-paper"}, "preset 'wanda-paper' is for pared compress; for pared tune there are: b"),
        (Recipe, {"preset": "wanda-paper", "method": "svd"}, "is a protocol of method wanda, found method 'svd'"),
        (Recipe, {"preset": "wanda-paper", "calibration": {"sampels": 1}}, "unknown key 'calibration.sampels'"),
        (Tuning, {"preset": "basel-lm", "epochs": 1.0, "tokens": 5}, "are two lengths"),
    ],
)
def test_what_is_no_preset_or_does_not_go_with_it_is_refused(kind: Any, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ParedError) as error:
        kind.of(fields)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_what_a_preset_leaves_to_the_user_is_asked_for(tmp_path: Path) -> None:
    with pytest.raises(ParedError, match=r"preset fwsvd-paper leaves calibration\.text to you: .*--data glue:sst2:tr"):
        require_user_fields(begun("fwsvd-paper"))
    require_user_fields(begun("fwsvd-paper", calibration={"text": "glue:sst2:train"}))
    with pytest.raises(ParedError, match="preset fwsvd-glue leaves data to you"):
        pared.training.tune(begun("fwsvd-glue", model=str(tmp_path), out=str(tmp_path / "out")))
    with pytest.raises(ParedError, match="preset fwsvd-paper leaves"):
        pared.run(begun("fwsvd-paper", model=str(tmp_path), out=str(tmp_path / "out")))
    named = begun("fwsvd-glue", data=["glue:cola:train"])
    assert named.deviations() == {}


def test_a_section_may_be_given_as_its_model() -> None:
    asked = Recipe(preset="basis-sharing-paper", calibration=pared.Calibration(samples=3), evaluation=None)
    assert (asked.calibration.samples, asked.calibration.seed, asked.evaluation) == (3, 2023, None)
    assert asked.deviations() == {"calibration.samples": {"preset": 256, "given": 3}}
    copied = asked.model_copy(update={"out": "somewhere"})
    assert (copied.calibration.seed, copied.out) == (2023, "somewhere")


def test_what_was_recorded_is_read_as_it_was_though_its_preset_is_gone() -> None:
    from pared.presets import RECORDED

    fields = {**begun("wanda-paper").model_dump(mode="json"), "preset": "wanda-1999", "sparsity": 0.25}
    assert Recipe.model_validate(fields, context=RECORDED).sparsity == 0.25
    with pytest.raises(ParedError, match="unknown preset 'wanda-1999'"):
        Recipe.model_validate(fields)


# From the command line, from a file, into the manifest.


def test_presets_are_listed_and_printed() -> None:
    listed = CliRunner().invoke(app, ["presets"])
    assert listed.exit_code == 0
    assert "basel-math" in listed.output
    printed = CliRunner().invoke(app, ["presets", "basis-sharing-lora"])
    assert printed.output == read_preset("basis-sharing-lora")
    wrong = CliRunner().invoke(app, ["presets", "basis-sharing"])
    assert wrong.exit_code == 2


def test_the_presets_are_read_without_torch() -> None:
    code = (
        "import sys, types; package = types.ModuleType('pared'); package.__path__ = [sys.argv[1]]; "
        "sys.modules['pared'] = package; from pared.presets import preset_names, load_preset; "
        "list(map(load_preset, preset_names())); assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, str(Path(pared.__file__).parent)], check=True)


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    folder = tmp_path_factory.mktemp("presets") / "dense"
    TINY_MODELS["llama"]().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_a_preset_and_its_deviations_are_printed_and_in_the_manifest(
    dense: Path, tmp_path: Path, text_file: Path
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("preset: basis-sharing-paper\ncalibration: {samples: 9}\nkeep: 0.7\n", encoding="utf-8")
    short = ["--data", f"file:{text_file}", "--length", "16", "--seed", "2023", "--eval", "none", "--samples", "5"]
    made = CliRunner().invoke(
        app, ["compress", str(dense), "--recipe", str(recipe), *short, "--out", str(tmp_path / "small")]
    )
    assert made.exit_code == 0, made.output
    manifest = Manifest.read(tmp_path / "small")
    recipe_of = manifest.recipe
    assert (recipe_of.preset, recipe_of.keep, recipe_of.calibration.samples) == ("basis-sharing-paper", 0.7, 5)
    assert (recipe_of.calibration.sampling, recipe_of.options["sharing"]) == ("shuffled", "paper")
    assert manifest.preset is not None
    assert manifest.preset["name"] == "basis-sharing-paper"
    assert set(manifest.preset["deviations"]) == {
        "keep", "calibration.samples", "calibration.text", "calibration.length"}  # fmt: skip
    line = "keep 0.7 (preset: 0.8)"
    for text in (made.output, (tmp_path / "small" / "README.md").read_text(encoding="utf-8")):
        assert line in text.replace("\n", " ")

    few = [
        "--data",
        f"file:{text_file}",
        "--length",
        "16",
        "--tokens",
        "64",
        "--precision",
        "float32",
        "--eval",
        "none",
    ]
    tuned = CliRunner().invoke(
        app, ["tune", str(tmp_path / "small"), "--preset", "basis-sharing-lora", *few, "--out", str(tmp_path / "tuned")]
    )
    assert tuned.exit_code == 0, tuned.output
    (training,) = Manifest.read(tmp_path / "tuned").training
    assert training.preset is not None
    assert training.preset["deviations"] == {
        "data": {"preset": ["wikitext2:train"], "given": [f"file:{text_file.name}"]},
        "length": {"preset": 2048, "given": 16},
        "epochs": {"preset": 2.0, "given": None},
        "tokens": {"preset": None, "given": 64},
        "precision": {"preset": "bfloat16", "given": "float32"},
    }
    before, after = (pared.load(tmp_path / name).state_dict() for name in ("small", "tuned"))
    moved = {name for name in after if not torch.equal(after[name], before[name])}
    assert moved
    assert all(name.endswith((".q_proj.up.weight", ".v_proj.up.weight")) for name in moved)
    raw = json.loads((tmp_path / "tuned" / "pared.json").read_text(encoding="utf-8"))
    assert raw["training"][0]["tuning"]["options"]["alpha"] == 32


def test_shuffled_windows_are_the_first_of_a_seeded_permutation(
    tokenizer: PreTrainedTokenizerFast, text_file: Path
) -> None:
    from pared.sources.texts import find_text

    text = find_text(f"file:{text_file}")
    every = cut(text, tokenizer, 16, None).tokens
    torch.manual_seed(2023)  # as the official code seeds the one generator there is
    expected = every[torch.randperm(len(every))[:7]]
    assert torch.equal(cut(text, tokenizer, 16, 7, "shuffled", 2023).tokens, expected)
    assert len(cut(text, tokenizer, 16, None, "shuffled", 1).tokens) == len(every)


def test_no_number_of_samples_means_all_there_are(tokenizer: PreTrainedTokenizerFast, text_file: Path) -> None:
    from pared.engine.asked import calibration_windows, trial_windows

    recipe = Recipe(calibration=pared.Calibration(text=f"file:{text_file}", samples=None, length=16), evaluation=None)
    config = TINY_MODELS["llama"]().config
    every = calibration_windows(recipe, tokenizer, config, True).tokens
    assert len(every) == 1000 // 16
    assert torch.equal(trial_windows(recipe, tokenizer, config).tokens, every[-8:])


def test_a_model_in_memory_is_told_of_its_preset_too(tokenizer: PreTrainedTokenizerFast, text_file: Path) -> None:
    notes: list[str] = []

    class Listening(Silent):
        def note(self, message: str) -> None:
            notes.append(message)

    recipe = {"preset": "wanda-paper", "calibration": {"text": f"file:{text_file}", "length": 16, "samples": 4}}
    pared.compress(TINY_MODELS["llama"](), tokenizer, Recipe.of(recipe), Listening())
    assert notes[0].startswith("preset wanda-paper, changed: calibration.text file:")
    with pytest.raises(ParedError, match="preset fwsvd-paper leaves"):
        pared.compress(TINY_MODELS["bert"](), tokenizer, Recipe.of({"preset": "fwsvd-paper"}))
