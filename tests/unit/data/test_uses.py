"""What a model is used for names a text to calibrate on: once, on the record, and below whatever else is named."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_models import TINY_MODELS
from tiny_tokenizer import tiny_tokenizer
from typer.testing import CliRunner

import pared
from pared import ParedError, Recipe
from pared.arguments import recipe_from
from pared.cli.commands import app
from pared.cli.from_schema import merge
from pared.data.corpora import CORPORA, HELD_OUT, STDLIB
from pared.data.instructions import SETS
from pared.data.texts import find_text, held_out, require_text
from pared.data.uses import USES, use_in_words, with_use
from pared.engine.spec import resolve

TEMPLATE = "{% for message in messages %}{{ message['role'] + ' ' + message['content'] + ' ' }}{% endfor %}"
Put = Callable[..., None]


@pytest.fixture
def put(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Put:
    """Puts rows into a folder that PARED_DATA names."""
    monkeypatch.setenv("PARED_DATA", str(tmp_path / "data"))

    def rows(file: str, *rows: dict[str, Any]) -> None:
        path = tmp_path / "data" / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")

    return rows


@pytest.fixture
def no_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PARED_DATA", raising=False)


def test_every_use_names_texts_that_there_are_and_most_have_a_part_held_out() -> None:
    for use, preset in USES.items():
        for name in filter(None, (preset.text, preset.local)):
            require_text(name)
            assert held_out(name) is not None or name == "alpaca:chat", use
    assert set(STDLIB) <= {*HELD_OUT, *HELD_OUT.values()}


def test_a_use_is_resolved_in_the_spec_and_stays_what_it_was_wherever_the_recipe_is_read(put: Put) -> None:
    recipe = Recipe(calibrate_on="code", model="m", method="svd-llm", keep=0.5)
    assert recipe.calibration.text == "embedded"  # of which nothing was said
    spec = resolve(recipe)
    assert (spec.calibration.text, spec.calibration.sampling) == ("stdlib:train", "shuffled")
    put("code/codeparrot_train.jsonl", {"content": "pass"})
    assert resolve(recipe).calibration.text == "codeparrot:train"
    for again in (spec.recipe, Recipe.of(spec.recipe.model_dump()), Recipe.of(spec.recipe.as_file())):
        assert resolve(again).recipe == spec.recipe
    assert spec.describe()["calibrate_on"] == (
        "code (shuffled windows of stdlib:train, which stands in for codeparrot:train here)"
    )


def test_a_dump_of_what_is_not_resolved_is_not_resolved(no_folder: None) -> None:
    asked = Recipe(calibrate_on="chat", calibration={"samples": 8})
    for again in (Recipe.of(asked.model_dump()), Recipe.of(asked.as_file()), asked.model_copy(update={"model": "m"})):
        assert with_use(again).calibration == with_use(asked).calibration
    assert with_use(asked).calibration.text == "ultrachat:train"
    assert with_use(asked).calibration.samples == 8


@pytest.mark.parametrize("use", USES)
def test_on_the_hub_a_use_is_the_whole_one_and_recipes_without_a_use_are_as_they_were(use: Any, no_folder: None):
    found = with_use(Recipe(calibrate_on=use))
    assert found.calibration.text == USES[use].text
    assert "stands in" not in use_in_words(found)
    plain = Recipe()
    assert with_use(plain) is plain
    assert "calibrate_on" not in resolve(Recipe(keep=0.5)).describe()


def test_a_text_or_a_sampling_beside_a_use_wins(no_folder: None) -> None:
    own = with_use(Recipe.of({"calibrate_on": "code", "calibration": {"text": "file:mine.txt"}})).calibration
    assert (own.text, own.sampling) == ("file:mine.txt", "shuffled")
    own = with_use(Recipe.of({"calibrate_on": "math", "calibration": {"sampling": "consecutive"}})).calibration
    assert (own.text, own.sampling) == ("gsm8k:train", "consecutive")
    own = with_use(recipe_from(None, {"calibrate_on": "math", "data": "embedded"}, "f")).calibration
    assert (own.text, own.sampling) == ("embedded", "shuffled")


def test_a_use_wins_over_the_text_of_what_it_is_laid_over(tmp_path: Path, no_folder: None) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text("calibration: {text: embedded, sampling: random-offset, samples: 3}\n", encoding="utf-8")
    found = {
        "a file": merge(Recipe, file, {"calibrate_on": "math"}),
        "a preset": Recipe.of({"preset": "wanda-paper", "calibrate_on": "math"}),
        "a recipe": recipe_from({"calibration": {"text": "embedded"}}, {"calibrate_on": "math"}, "f"),
        "and samples": recipe_from({"calibration": {"text": "embedded"}}, {"calibrate_on": "math", "samples": 3}, "f"),
        "another use": Recipe.of(with_use(Recipe(calibrate_on="code"))).model_copy(update={"calibrate_on": "math"}),
    }
    for how, recipe in found.items():
        own = with_use(recipe).calibration
        assert (own.text, own.sampling) == ("gsm8k:train", "shuffled"), how
    assert with_use(found["a file"]).calibration.samples == 3
    assert with_use(found["a preset"]).calibration.samples == 128
    deviations = with_use(found["a preset"]).deviations()
    assert deviations["calibration.text"] == {"preset": "c4:train", "given": "gsm8k:train"}


@pytest.mark.parametrize("folder", [True, False])
def test_a_text_that_cannot_be_reached_says_how_to_give_a_file(
    folder: bool, put: Put, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not folder:
        monkeypatch.delenv("PARED_DATA")
    for name in {preset.text for preset in USES.values()}:
        with pytest.raises(ParedError, match=f"or give a text of your own in place of '{name}': file:PATH"):
            find_text(name)


def test_an_unknown_use_offers_those_there_are() -> None:
    with pytest.raises(ParedError, match="calibrate_on: expected 'code', 'math', 'chat' or 'general'; got 'poems'"):
        Recipe.of({"calibrate_on": "poems"})


# The texts


def test_the_source_of_the_standard_library_is_two_texts_without_a_module_in_common() -> None:
    one, other = map(find_text, STDLIB)
    assert one.stand_in
    assert other.stand_in
    assert not set(one.documents) & set(other.documents)
    assert abs(len(one.documents) - len(other.documents)) <= 1
    assert "class JSONDecoder" in one.joined + other.joined
    assert "class SupportTest" not in one.joined + other.joined  # of test/
    assert held_out("stdlib:train") == "stdlib:test"


def test_solved_questions_are_one_text_each(put: Put) -> None:
    put("math/gsm8k_train.jsonl", {"question": "1+1?", "answer": "2\n#### 2"}, {"question": "2?", "answer": "#### 2"})
    assert find_text("gsm8k:train").documents == ("Question: 1+1?\nAnswer: 2\n#### 2", "Question: 2?\nAnswer: #### 2")
    put("math/gsm8k_train.jsonl", {"question": "1+1?"})
    with pytest.raises(ParedError, match="row 1: expected an object whose 'text' field is a string"):
        find_text("gsm8k:train")


def test_the_file_of_a_text_is_that_of_the_instructions_of_its_name() -> None:
    for name in ("gsm8k:train", "gsm8k:test", "alpaca"):
        assert CORPORA[name].file.removesuffix(".gz") == SETS[name].file.removesuffix(".gz")
        assert CORPORA[name].hub == SETS[name].hub


def test_conversations_are_by_the_chat_template_of_the_model(put: Put) -> None:
    tokenizer = tiny_tokenizer(64)
    put("instruct/alpaca_random_9k.jsonl", {"instruction": "Add.", "input": "1 1", "output": "2"})
    put("instruct/ultrachat_train.jsonl", {"messages": [{"role": "user", "content": "Hi"}]})
    with pytest.raises(ParedError, match="is a conversation, and this model's tokenizer has no chat template"):
        find_text("alpaca:chat", tokenizer=tokenizer)
    tokenizer.chat_template = TEMPLATE
    assert find_text("alpaca:chat", tokenizer=tokenizer).documents == ("user Add.\n\n1 1 assistant 2 ",)
    assert find_text("ultrachat:train", tokenizer=tokenizer).documents == ("user Hi ",)


# From end to end


def test_a_compression_calibrates_on_the_text_of_its_use_and_records_both(
    put: Put, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    put("math/gsm8k_train.jsonl", *({"question": f"w{n} w3", "answer": f"w{n + 1} #### {n}"} for n in range(60)))
    TINY_MODELS["llama"]().save_pretrained(tmp_path / "dense")
    tiny_tokenizer(64).save_pretrained(tmp_path / "dense")
    words = [str(tmp_path / "dense"), "--method", "svd-llm", "--keep", "0.6", "--calibrate-on", "math"]
    told = CliRunner().invoke(app, ["plan", *words])
    assert told.exit_code == 0, told.output
    assert "calibrate on math (shuffled windows of gsm8k:train)" in " ".join(told.output.replace("│", " ").split())
    recipe = {"model": words[0], "method": "svd-llm", "keep": 0.6, "calibrate_on": "math", "out": tmp_path / "small",
              "calibration": {"samples": 6, "length": 16}, "evaluation": None}  # fmt: skip
    manifest = pared.run(Recipe.of(recipe)).manifest
    assert manifest.recipe.calibrate_on == "math"
    assert manifest.recipe.calibration.text == "gsm8k:train"
    assert manifest.calibration["text"] == "gsm8k:train"
    assert manifest.calibration["windows"] == 6
    assert manifest.settled["calibrate_on"] == "math (shuffled windows of gsm8k:train)"
