"""A protocol by name is what its file says, what is given beside it wins, and every deviation is told."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tiny_models import TINY_MODELS
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

import pared
from pared import ParedError, Recipe
from pared.cli.commands import app
from pared.cli.from_schema import merge
from pared.data.windows import cut
from pared.engine.spec import resolve
from pared.progress import Silent
from pared.report.card import model_card
from pared.schema.fields import flatten
from pared.schema.manifest import Manifest
from pared.schema.presets import (
    DEMO,
    FromPreset,
    load_preset,
    preset_names,
    read_preset,
    record_of,
    require_user_fields,
    summary_of,
    to_markdown,
)
from pared.schema.training import TrainingConfig
from pared.training.registry import METHODS, settled

DOCS = Path(__file__).parents[3] / "docs"
PROTOCOLS = [name for name in preset_names() if name != DEMO]
RECIPES = [name for name in preset_names() if load_preset(name).command == "compress"]
TUNINGS = [name for name in preset_names() if load_preset(name).command == "tune"]


def begun(name: str, **more: Any) -> FromPreset:
    return (Recipe if name in RECIPES else TrainingConfig).of({"preset": name, **more})


def test_all_protocols_of_the_papers_are_there() -> None:
    assert {"basis-sharing-lora", "basis-sharing-full", "svd-llm-lora", "basel-math", "basel-code", "basel-lm",
            "fwsvd-glue"} == set(TUNINGS)  # fmt: skip
    assert {"basis-sharing-paper", "svd-llm-paper", "fwsvd-paper", "asvd-paper", "wanda-paper", "sparsegpt-paper",
            "dsa-paper", "lowrankarena", DEMO} == set(RECIPES)  # fmt: skip


@pytest.mark.parametrize("name", preset_names())
def test_a_preset_alone_deviates_in_nothing_and_every_field_is_of_the_schema(name: str) -> None:
    asked = begun(name)
    assert asked.deviations() == {}
    dumped = dict(flatten(asked.model_dump(mode="json")))
    for field, value in flatten(load_preset(name).fields):
        assert dumped[field] == value, field
    assert type(asked).model_validate(asked.model_dump()) == asked


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
    spec = resolve(recipe)
    assert spec.config.model_dump() == {**spec.method.config.defaults(), **recipe.options}
    assert spec.describe()


@pytest.mark.parametrize("name", TUNINGS)
def test_a_training_preset_spells_every_option_of_its_method(name: str) -> None:
    """A default of ours that changes must not change a protocol."""
    tuning = begun(name)
    method = METHODS[tuning.method]
    assert tuning.options.keys() == method.config.defaults().keys()
    assert {key: type(value) for key, value in tuning.options.items()} == {
        key: type(value) for key, value in method.config.defaults().items()
    }
    settled(method, tuning.options)


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
        (
            TrainingConfig,
            {"preset": "wanda-paper"},
            "preset 'wanda-paper' is for pared compress; for pared tune there",
        ),
        (Recipe, {"preset": "wanda-paper", "method": "svd"}, "is a protocol of method wanda, got method 'svd'"),
        (Recipe, {"preset": "wanda-paper", "calibration": {"sampels": 1}}, "unknown key 'calibration.sampels'"),
        (TrainingConfig, {"preset": "basel-lm", "epochs": 1.0, "tokens": 5}, "are two lengths"),
    ],
)
def test_what_is_no_preset_or_does_not_go_with_it_is_refused(kind: Any, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ParedError) as error:
        kind.of(fields)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_what_a_preset_leaves_to_the_user_is_asked_for(tmp_path: Path) -> None:
    with pytest.raises(ParedError, match=r"preset fwsvd-paper leaves calibration\.text to you: .* glue:sst2:tr"):
        require_user_fields(begun("fwsvd-paper"))
    require_user_fields(begun("fwsvd-paper", calibration={"text": "glue:sst2:train"}))
    with pytest.raises(ParedError, match="preset fwsvd-glue leaves data to you"):
        pared.tune(begun("fwsvd-glue", model=str(tmp_path), out=str(tmp_path / "out")))
    with pytest.raises(ParedError, match="preset fwsvd-paper leaves"):
        pared.run(begun("fwsvd-paper", model=str(tmp_path), out=str(tmp_path / "out")))
    named = begun("fwsvd-glue", data=["glue:cola:train"])
    assert named.deviations() == {}


def test_a_section_may_be_given_as_its_model() -> None:
    asked = Recipe(preset="basis-sharing-paper", calibration=pared.Calibration(samples=3), evaluation=None)
    assert (asked.calibration.samples, asked.calibration.seed, asked.evaluation) == (3, 2023, None)
    measured = {"text": "wikitext2:test", "length": 2048, "windows": None, "bos": "none"}
    assert asked.deviations() == {
        "calibration.samples": {"preset": 256, "given": 3},
        "evaluation": {"preset": measured, "given": None},
    }
    told = "evaluation none (preset: text wikitext2:test, length 2048, windows all, bos none)"
    assert told in summary_of(record_of(asked) or {})
    copied = asked.model_copy(update={"out": "somewhere"})
    assert (copied.calibration.seed, copied.out) == (2023, "somewhere")


def test_no_number_of_windows_is_told_as_all() -> None:
    asked = begun("basis-sharing-paper", calibration={"samples": None}, evaluation={"windows": 5})
    told = summary_of(record_of(asked) or {})
    assert "calibration.samples all (preset: 256)" in told
    assert "evaluation.windows 5 (preset: all)" in told


@pytest.mark.parametrize(
    ("name", "given", "gone"),
    [
        ("dsa-paper", {"allocation": "er-plus"}, {"allocation_options.program", "allocation_options.granularity"}),
        ("asvd-paper", {"rank_fraction": 0.3}, {"allocation", "keep"}),
        ("basis-sharing-paper", {"rank_fraction": 0.3}, {"allocation", "keep"}),
        ("svd-llm-paper", {"rank_fraction": 0.3}, {"allocation", "keep"}),
        ("svd-llm-lora", {"validation": 0}, {"evaluate_every", "patience"}),
    ],
)
def test_what_does_not_go_with_what_is_given_leaves_the_preset_with_it(
    name: str, given: dict[str, Any], gone: set[str]
) -> None:
    """Regression: options of the preset's own allocation were laid before another one, which does not have them."""
    asked = begun(name, **given)
    deviations = asked.deviations()
    assert gone | set(given) <= set(deviations)
    copied = begun(name).model_copy(update=given)
    assert (copied, copied.deviations()) == (asked, deviations)
    if isinstance(asked, Recipe):
        assert resolve(asked).describe()
        assert Recipe.of(asked.model_dump()) == asked


@pytest.mark.parametrize(
    ("kind", "file", "given", "expected"),
    [
        (Recipe, {"keep": 0.8}, {"rank_fraction": 0.33}, {"rank_fraction": 0.33}),
        (Recipe, {"rank_fraction": 0.3}, {"keep": 0.7}, {"keep": 0.7}),
        (Recipe, {"sparsity": 0.5, "method": "wanda"}, {"pattern": "2:4"}, {"pattern": "2:4", "method": "wanda"}),
        (Recipe, {"preset": "asvd-paper", "keep": 0.8}, {"rank_fraction": 0.3},
         {"preset": "asvd-paper", "rank_fraction": 0.3}),
        (Recipe, {"allocation": "dsa", "allocation_options": {"program": "x"}}, {"allocation": "loss"},
         {"allocation": "loss"}),
        (TrainingConfig, {"epochs": 3.0}, {"tokens": 1000}, {"tokens": 1000}),
        (TrainingConfig, {"tokens": 1000}, {"epochs": 2.0}, {"epochs": 2.0}),
    ],
)  # fmt: skip
def test_a_budget_or_length_given_replaces_another_of_a_file_or_a_copy(
    kind: Any, file: dict[str, Any], given: dict[str, Any], expected: dict[str, Any], tmp_path: Path
) -> None:
    """Regression: an option beside the file's other budget was refused as the second of two."""
    path = tmp_path / "asked.yaml"
    path.write_text(yaml.safe_dump(file), encoding="utf-8")
    assert merge(kind, path, given) == kind.of(expected)
    assert kind.of(file).model_copy(update=given) == kind.of(expected)


def test_an_option_given_leaves_the_other_options_of_a_file(tmp_path: Path) -> None:
    """Regression: one ``--option`` beside a file dropped all that the file has, where a preset keeps them."""
    path = tmp_path / "asked.yaml"
    path.write_text("method: basis-sharing\noptions: {group_size: 2, sharing: paper}\n", encoding="utf-8")
    asked = merge(Recipe, path, {"options": {"group_size": 3}})
    assert asked.options == {"group_size": 3, "sharing": "paper"}


def test_two_budgets_on_the_command_line_are_two(tmp_path: Path) -> None:
    path = tmp_path / "asked.yaml"
    path.write_text("keep: 0.8", encoding="utf-8")
    with pytest.raises(ParedError, match="are two budgets"):
        merge(Recipe, path, {"keep": 0.5, "rank_fraction": 0.3})


def test_what_was_recorded_is_read_as_it_was_though_its_preset_is_gone() -> None:
    from pared.schema.presets import RECORDED

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
        "sys.modules['pared'] = package; from pared.schema.presets import preset_names, load_preset; "
        "list(map(load_preset, preset_names())); assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, str(Path(pared.__file__).parent)], check=True)


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    folder = tmp_path_factory.mktemp("presets") / "dense"
    TINY_MODELS["llama"]().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def manifest(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    place = tmp_path_factory.mktemp("card")
    recipe = Recipe(model=str(dense), method="svd", keep=0.7, evaluation=None, out=str(place / "out"))
    return pared.run(recipe).manifest


CARDS: list[dict[str, Any]] = [
    *({"preset": name, "calibration": {"text": "file:x.txt", "samples": 3}} for name in RECIPES),
    {"preset": "basis-sharing-paper", "evaluation": None},
    {"preset": "basis-sharing-paper", "calibration": {"samples": None}},
    {"preset": "dsa-paper", "allocation": "er-plus"},
    {"preset": "fwsvd-paper", "keep": 0.5},
    {"preset": "asvd-paper", "rank_fraction": 0.3},
    {"evaluation": None},
    {"method": "svd", "calibration": {"samples": None}, "evaluation": {"windows": None}},
    {"rank_fraction": 0.33},
]


@pytest.mark.parametrize("fields", CARDS, ids=str)
def test_the_recipe_of_a_model_card_is_the_same_recipe(fields: dict[str, Any], manifest: Manifest) -> None:
    """Regression: nulls were left out of the card, where the default, or the preset, is a number."""
    asked = Recipe.of(fields)
    card = model_card(manifest.model_copy(update={"recipe": asked}), "folder", {})
    shown = yaml.safe_load(card.partition("```yaml\n")[2].partition("```")[0])
    assert Recipe.of(shown) == asked


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
        "keep", "calibration.samples", "calibration.text", "calibration.length", "evaluation"}  # fmt: skip
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


def test_lengths_of_a_preset_give_way_to_what_a_model_takes_and_that_is_told(
    dense: Path, tmp_path: Path, text_file: Path
) -> None:
    """Regression: a preset's length counted as asked for, and GPT-2, of 1024 positions, was refused."""
    text = f"file:{text_file}"
    recipe = {"preset": "basis-sharing-paper", "model": str(dense), "out": str(tmp_path / "small"),
              "calibration": {"text": text, "samples": 1}, "evaluation": {"text": text, "windows": 1}}  # fmt: skip
    made = pared.run(Recipe.of(recipe)).manifest
    assert made.calibration is not None
    assert made.preset is not None
    length = made.calibration["length"]
    assert length < 2048
    assert made.preset["deviations"]["calibration.length"] == {"preset": 2048, "given": length}
    assert made.preset["deviations"]["evaluation.length"] == {"preset": 2048, "given": length}
    assert (made.recipe.calibration.length, made.recipe.calibration.seed) == (length, 2023)
    with pytest.raises(ParedError, match="2048 tokens"):
        pared.run(Recipe.of({**recipe, "out": str(tmp_path / "other"), "calibration": {"text": text, "length": 2048}}))

    tuning = {"preset": "basis-sharing-lora", "model": str(tmp_path / "small"), "out": str(tmp_path / "tuned"),
              "data": [text], "tokens": 64, "precision": "float32", "evaluation": None, "validation": 0}  # fmt: skip
    (training,) = pared.tune(TrainingConfig.of(tuning)).manifest.training
    assert training.preset is not None
    assert training.preset["deviations"]["length"] == {"preset": 2048, "given": length}
    assert training.tuning.length == length


def test_shuffled_windows_are_the_first_of_a_seeded_permutation(
    tokenizer: PreTrainedTokenizerFast, text_file: Path
) -> None:
    from pared.data.texts import find_text

    text = find_text(f"file:{text_file}")
    every = cut(text, tokenizer, 16, None).tokens
    torch.manual_seed(2023)  # as the official code seeds the one generator there is
    expected = every[torch.randperm(len(every))[:7]]
    assert torch.equal(cut(text, tokenizer, 16, 7, "shuffled", 2023).tokens, expected)
    assert len(cut(text, tokenizer, 16, None, "shuffled", 1).tokens) == len(every)


def test_no_number_of_samples_means_all_there_are(tokenizer: PreTrainedTokenizerFast, text_file: Path) -> None:
    from pared.engine.windows import calibration_windows, trial_windows

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


def test_a_benchmark_goes_with_any_method_and_holds_it_to_its_own_setting() -> None:
    for more in ({}, {"method": "svd-llm", "refit": "sequential"}, {"method": "basis-sharing", "keep": 0.8}):
        asked = Recipe.of({"preset": "lowrankarena", "model": "m", **more})
        assert asked.method == more.get("method", "loss-optimal")
        assert asked.deviations() == {}
        assert resolve(asked).calibration.samples == 256
    left = Recipe.of({"preset": "lowrankarena", "method": "svd", "keep": 0.6, "quantize": "int8",
                      "calibration": {"text": "c4:train"}})  # fmt: skip
    assert {name: one["given"] for name, one in left.deviations().items()} == {
        "keep": 0.6, "quantize": "int8", "calibration.text": "c4:train"
    }  # fmt: skip
