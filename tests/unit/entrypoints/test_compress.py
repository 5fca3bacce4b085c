"""One call from Python: a model by name or loaded, texts in many forms, and the folder of the command line."""

import json
import shutil
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from tiny_models import TINY_MODELS
from transformers import PreTrainedModel, PreTrainedTokenizerFast
from typer.testing import CliRunner

import pared
from pared import ParedError
from pared.cli.commands import app
from pared.data import Text, cut
from pared.models.source import EMBEDDED

WORDS = " ".join(f"w{(7 * place * place + 3 * place) % 64}" for place in range(600))
SMALL: dict[str, Any] = {"method": "svd-llm", "keep": 0.6, "samples": 4, "length": 32}
# What two runs of one recipe may differ in.
CLOCKS = ("seconds", "peak_memory_bytes", "memory_bound_bytes", "checksum")


@pytest.fixture(scope="module")
def place(place: Path) -> Path:
    (place / "words.txt").write_text(WORDS)
    asked = [
        str(place / "llama"), "--method", "svd-llm", "--keep", "0.6", "--data", f"file:{place}/words.txt",
        "--samples", "4", "--length", "32", "--eval-length", "32", "--out", str(place / "made"),
    ]  # fmt: skip
    done = CliRunner().invoke(app, ["compress", *asked])
    assert done.exit_code == 0, done.output
    return place


@pytest.fixture
def model() -> PreTrainedModel:
    return TINY_MODELS["llama"]()


def manifest_of(folder: Path) -> dict[str, Any]:
    fields: dict[str, Any] = json.loads((folder / "pared.json").read_text())
    return {name: value for name, value in fields.items() if name not in CLOCKS}


def asked_on(place: Path) -> dict[str, Any]:
    return {**SMALL, "data": place / "words.txt", "evaluation": {"length": 32}}


def test_a_result_saves_the_folder_of_the_command_line(place: Path, tmp_path: Path) -> None:
    result = pared.compress(place / "llama", **asked_on(place))
    outcome = result.save(tmp_path / "made")
    made, there = manifest_of(tmp_path / "made"), manifest_of(place / "made")
    cards = [fields["files"].pop("README.md") for fields in (made, there)]
    assert made == there
    assert all(cards)
    assert made["perplexity_after"] == outcome.manifest.perplexity_after
    assert {path.name for path in (tmp_path / "made").iterdir()} == {path.name for path in (place / "made").iterdir()}
    assert pared.verify(tmp_path / "made") <= 1e-6


def test_a_loaded_model_saves_the_same_but_for_its_name(place: Path, tmp_path: Path) -> None:
    model, tokenizer = pared.load(place / "llama"), pared.load_tokenizer(place / "llama")
    pared.compress(model, tokenizer, **asked_on(place)).save(tmp_path / "made")
    made, there = manifest_of(tmp_path / "made"), manifest_of(place / "made")
    for fields in (made, there):
        del fields["files"]["README.md"]
        assert fields["model"].pop("origin") in ("loaded in Python", "local folder")
    assert made == there
    assert all(str(place).encode() not in path.read_bytes() for path in (tmp_path / "made").iterdir())


def test_a_model_that_was_never_saved_is_named_by_its_class(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    manifest = pared.compress(model, tokenizer, method="svd", keep=0.5).save(tmp_path / "made").manifest
    assert manifest.model["name"] == "LlamaForCausalLM"
    assert (manifest.recipe.model, manifest.perplexity_before, manifest.evaluation) == (None, None, None)
    assert pared.verify(tmp_path / "made") <= 1e-6


def test_a_model_is_recorded_by_the_name_it_was_loaded_by(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its configuration has the place: of an embedded model a folder of the cache."""
    monkeypatch.setitem(EMBEDDED, "tiny", ("tinypackage", "llama", "tiny"))
    (place / "tinypackage").mkdir(exist_ok=True)
    (place / "tinypackage" / "__init__.py").touch()
    shutil.copytree(place / "llama", place / "tinypackage" / "llama", dirs_exist_ok=True)
    monkeypatch.syspath_prepend(place)
    model, tokenizer = pared.load("embedded:tiny"), pared.load_tokenizer("embedded:tiny")
    manifest = pared.compress(model, tokenizer, method="svd", keep=0.5).save(tmp_path / "made").manifest
    assert (manifest.model["name"], manifest.recipe.model) == ("embedded:tiny", "embedded:tiny")
    assert manifest.inputs == {}


def test_the_model_stays_after_it_was_saved(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    result = pared.compress(model, tokenizer, method="svd", keep=0.5)
    assert result.model is model
    result.save(tmp_path / "one")
    with pytest.raises(ParedError, match="is there already"):
        result.save(tmp_path / "one")
    result.save(tmp_path / "one", overwrite=True)
    result.model.save_pretrained(tmp_path / "plain")
    ids = torch.arange(1, 9).unsqueeze(0)
    with torch.no_grad():
        assert torch.equal(pared.load(tmp_path / "one")(ids).logits, model(ids).logits)


def factors(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    return {name: value for name, value in model.state_dict().items() if name.endswith(("up.weight", "down.weight"))}


def test_texts_are_calibrated_on_in_every_form_they_come_in(
    tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [WORDS[:900], WORDS[900:]]
    conversation = [{"role": "user", "content": rows[0]}, {"role": "assistant", "content": rows[1]}]
    template = "{% for message in messages %}{{ message.content }}\n\n{% endfor %}"
    monkeypatch.setattr(tokenizer, "chat_template", template, raising=False)
    forms: list[Any] = [
        rows,
        tuple(rows),
        datasets.Dataset.from_dict({"text": rows, "label": [0, 1]}),
        datasets.Dataset.from_dict({"messages": [conversation]}),
        cut(Text("words", tuple(rows), "here"), tokenizer, 32, 4),
    ]
    found = [factors(pared.compress(TINY_MODELS["llama"](), tokenizer, **SMALL, data=data).model) for data in forms]
    assert found[0]
    for other in found[1:]:
        assert all(torch.equal(value, other[name]) for name, value in found[0].items())
    told = pared.compress(TINY_MODELS["llama"](), tokenizer, **SMALL, data=rows)
    assert told.calibration is not None
    assert (told.calibration["text"], told.calibration["origin"]) == ("python:data", "2 texts passed in Python")
    assert told.recipe.calibration.text == "python:data"


def test_an_allocation_that_tries_on_text_tries_on_the_texts_given(tokenizer: PreTrainedTokenizerFast) -> None:
    """Its windows are cut by the name of the text, which is known inside of the call alone."""
    asked = {**SMALL, "method": "swift-svd", "data": [WORDS]}
    result = pared.compress(TINY_MODELS["llama"](), tokenizer, **asked)
    assert result.plan.achieved_keep <= 0.6
    with pytest.raises(ParedError, match="unknown text 'python:data'"):
        pared.compress(TINY_MODELS["llama"](), tokenizer, result.recipe)


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "too little text": ({**SMALL, "data": ["w3 w4"]}, "passed in Python has 2 tokens, fewer than one window of 32"),
    "too little text by one": ({**SMALL, "data": ["w3"]}, "the data passed in Python has 1 token, fewer than"),
    "no text": ({**SMALL, "data": []}, "data has no text"),
    "blank text": ({**SMALL, "data": ["", " "]}, "data has no text; got 2 empty rows"),
    "numbers": ({**SMALL, "data": [3]}, "data, row 0: expected an object whose 'text' field is a string, got int"),
    "a number": ({**SMALL, "data": 3}, "expected the name of a text, a list of strings, .* got 3"),
    "rows without": ({**SMALL, "data": datasets.Dataset.from_dict({"txt": ["w3"]})}, r"row 0: .* got \['txt'\]"),
    "splits": ({**SMALL, "data": datasets.DatasetDict({"train": datasets.Dataset.from_dict({"text": ["w3"]})})},
               "got a DatasetDict of 'train'; name one of its parts"),
    "a name": ({**SMALL, "data": "wikitxt2:test"}, "did you mean 'wikitext2:test'"),
    "a misspelt field": ({"kep": 0.5}, "pared.compress: unknown key 'kep'; did you mean 'keep'"),
    "a percentage": ({"keep": 80}, "did you mean 0.8"),
    "two budgets": ({"keep": 0.5, "sparsity": 0.5}, "two budgets"),
    "a misspelt method": ({"method": "svd-lm"}, "did you mean 'svd-llm'"),
    "nobody who watches": ({**SMALL, "progress": 3}, "takes an object .* as progress.*got an int"),
}  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG)
def test_what_is_wrong_is_told_in_one_line(
    wrong: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    fields, message = WRONG[wrong]
    with pytest.raises(ParedError, match=message) as error:
        pared.compress(model, tokenizer, **fields)
    assert "\n" not in str(error.value)


def test_fields_are_laid_over_a_recipe(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    below = pared.Recipe(method="svd", keep=0.8, calibration=pared.Calibration(seed=3, samples=7))
    result = pared.compress(model, tokenizer, below, keep=0.5, samples=2)
    assert result.recipe == pared.Recipe(method="svd", keep=0.5, calibration=pared.Calibration(seed=3, samples=2))


def test_another_budget_takes_the_place_of_the_recipes(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    result = pared.compress(model, tokenizer, {"method": "magnitude", "sparsity": 0.3}, pattern="2:4")
    assert (result.recipe.sparsity, result.recipe.pattern) == (None, "2:4")
