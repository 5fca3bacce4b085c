"""The metadata of cards is what the Hub reads, by its own library."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard

import pared
from pared import Calibration, Evaluation, Recipe
from pared.data.published import hub_set_of
from pared.report.card import model_card
from pared.report.metadata import task_of
from pared.schema.manifest import Manifest


@pytest.fixture(scope="module")
def made(place: Path) -> Path:
    (place / "llama" / "README.md").write_text("---\nlicense: apache-2.0\n---\n# Tiny\n")
    text = f"file:{place / 'words.txt'}"
    pared.run(
        Recipe(
            model=str(place / "llama"),
            method="svd-llm",
            keep=0.6,
            calibration=Calibration(text=text, samples=4, length=16),
            evaluation=Evaluation(text=text, windows=2, length=16),
            out=str(place / "made"),
        )
    )
    return place / "made"


def test_a_card_parses_with_the_library_of_the_hub_and_has_every_field(made: Path) -> None:
    card = ModelCard((made / "README.md").read_text())
    assert card.data.library_name == "transformers"
    assert card.data.pipeline_tag == "text-generation"
    assert card.data.license == "apache-2.0"
    assert card.data.tags == ["pared", "low-rank", "svd-llm"]
    after, before = card.data.eval_results
    manifest = Manifest.read(made)
    assert (after.metric_value, before.metric_value) == (manifest.perplexity_after, manifest.perplexity_before)
    assert after.dataset_name == "file:words.txt"
    assert card.data.model_name == "made"


def test_a_card_of_corpora_names_their_data_sets(made: Path) -> None:
    manifest = Manifest.read(made)
    assert manifest.calibration is not None
    assert manifest.evaluation is not None
    manifest = manifest.model_copy(
        update={
            "calibration": {**manifest.calibration, "text": "c4:train"},
            "evaluation": {**manifest.evaluation, "text": "wikitext2:test"},
            "model": {**manifest.model, "origin": "Hugging Face Hub", "name": "owner/tiny"},
        }
    )
    data = ModelCard(model_card(manifest, "made", {"architectures": ["LlamaForCausalLM"]})).data
    assert data.datasets == ["allenai/c4"]
    assert data.base_model == "owner/tiny"
    assert data.eval_results[0].dataset_type == "Salesforce/wikitext"
    assert (data.eval_results[0].dataset_config, data.eval_results[0].dataset_split) == ("wikitext-2-raw-v1", "test")


def test_what_is_not_known_is_left_out(made: Path) -> None:
    manifest = Manifest.read(made).model_copy(update={"evaluation": None, "perplexity_after": None})
    header = yaml.safe_load(model_card(manifest, "made", {"architectures": ["LlamaModel"]}).split("---\n")[1])
    assert header.keys() == {"library_name", "license", "tags"}


def test_no_place_of_this_machine_is_in_the_metadata(made: Path, place: Path) -> None:
    assert place.name not in (made / "README.md").read_text()


@pytest.mark.parametrize(
    ("config", "task"),
    [
        ({"architectures": ["LlamaForCausalLM"]}, "text-generation"),
        ({"architectures": ["GPT2LMHeadModel"]}, "text-generation"),
        ({"architectures": ["BertForSequenceClassification"]}, "text-classification"),
        ({"architectures": ["T5ForConditionalGeneration"]}, None),
        ({"architectures": ["Gemma3ForConditionalGeneration"], "vision_config": {}}, "image-text-to-text"),
        ({"architectures": ["BertModel"]}, None),
        ({}, None),
    ],
)
def test_a_task_is_that_of_the_head(config: dict[str, Any], task: str | None) -> None:
    assert task_of(config) == task


@pytest.mark.parametrize(
    ("name", "repository"),
    [
        ("wikitext2:train", "Salesforce/wikitext"),
        ("c4:validation", "allenai/c4"),
        ("instruct:gsm8k:train", "openai/gsm8k"),
        ("glue:mnli-mm:dev", "nyu-mll/glue"),
        ("owner/set[en]:train:text", "owner/set"),
        ("embedded", None),
        ("embedded:eval", None),
        ("file:words.txt[:80%]", None),
        ("file:C:words.txt", None),
        ("ptb:test", None),
        ("ner:wnut17:train", None),
        ("python:data", None),
    ],
)
def test_a_text_is_known_by_its_data_set_on_the_hub(name: str, repository: str | None) -> None:
    found = hub_set_of(name)
    assert (None if found is None else found.repository) == repository
