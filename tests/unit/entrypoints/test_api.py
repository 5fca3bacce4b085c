"""What ``import pared`` gives: the names, and each of the calls on a tiny model."""

from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from tiny_models import TINY_MODELS
from transformers import PreTrainedModel, PreTrainedTokenizerFast

import pared

WORDS = " ".join(f"w{(7 * place * place + 3 * place) % 64}" for place in range(1200))
API = {
    "Calibration", "Compressed", "Evaluation", "EvaluationConfig", "ExploreConfig", "Explored", "Manifest",
    "ParedError", "Plan", "Recipe", "SearchConfig", "TrainingConfig", "__version__", "collect_statistics", "compare",
    "compress", "convert", "evaluate", "explore", "export", "load", "load_tokenizer", "perplexity", "plan", "report",
    "run", "search", "slice", "tune", "verify",
}  # fmt: skip


@pytest.fixture(scope="module")
def place(place: Path) -> Path:
    (place / "words.txt").write_text(WORDS)
    pared.compress(place / "llama", method="svd", keep=0.5, evaluation=None).save(place / "small")
    return place


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return TINY_MODELS["llama"]()


def test_what_dir_lists_is_the_api() -> None:
    assert dir(pared) == sorted(pared.__all__)
    assert set(pared.__all__) == API
    for name in API - {"__version__"}:
        assert getattr(pared, name).__doc__, name


def test_a_plan_is_the_same_by_name_and_loaded_and_that_of_the_compression(place: Path, model: PreTrainedModel) -> None:
    plan = pared.plan(place / "llama", method="svd", keep=0.5)
    assert plan == pared.plan(model, pared.Recipe(method="svd"), keep=0.5)
    assert plan == pared.Manifest.read(place / "small").plan


def test_a_folder_is_exported_converted_and_checked(place: Path, tmp_path: Path) -> None:
    exported = pared.export(place / "small", tmp_path / "plain")
    assert exported.self_check <= 1e-5
    assert not hasattr(pared.load(tmp_path / "plain").config, "quantization_config")
    manifest = pared.convert(place / "small", str(tmp_path / "pivoted"))
    assert manifest.converted == "pivots and coefficients"
    assert (tmp_path / "pivoted" / "README.md").is_file()
    back = pared.convert(tmp_path / "pivoted", tmp_path / "factors", pivoted=False)
    assert back.plan == pared.Manifest.read(place / "small").plan


def test_collected_statistics_stand_in_for_a_pass(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    cut: dict[str, Any] = {"data": [WORDS], "samples": 4, "length": 32}
    asked: dict[str, Any] = {"method": "svd-llm", "keep": 0.6, **cut}
    folder = pared.collect_statistics(TINY_MODELS["llama"](), tokenizer, tmp_path / "grams", ["gram"], **cut)
    ids = torch.arange(1, 9).unsqueeze(0)
    logits = []
    for collected in (None, folder):
        result = pared.compress(TINY_MODELS["llama"](), tokenizer, **asked, collected=collected)
        with torch.no_grad():
            logits.append(result.model(ids).logits)
    torch.testing.assert_close(*logits, atol=1e-3, rtol=1e-3)


def test_statistics_collected_by_name_serve_the_loaded_model_and_the_streamed_one(
    place: Path, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """They say of which model they are, which is the same one however it is read."""
    cut: dict[str, Any] = {"data": place / "words.txt", "samples": 4, "length": 32}
    saved = pared.collect_statistics(place / "llama", None, tmp_path / "grams", ["gram"], **cut)
    asked: dict[str, Any] = {"method": "svd-llm", "collected": saved, "evaluation": None, **cut}
    by_name = pared.compress(place / "llama", **asked)
    assert by_name.plan == pared.compress(pared.load(place / "llama"), tokenizer, **asked).plan
    assert by_name.plan == pared.compress(place / "llama", stream="on", **asked).plan


def test_a_folder_is_trained_by_its_name(place: Path, tmp_path: Path) -> None:
    made = pared.tune(
        place / "small",
        method="full",
        data=(f"file:{place}/words.txt",),
        length=16,
        windows=8,
        validation=2,
        batch=4,
        evaluation=None,
        out=tmp_path / "trained",
    )
    assert made.manifest.training[0].tuning.method == "full"
    assert "trained by full on file:words.txt" in repr(made)


def test_a_search_goes_by_name_and_loaded_and_resumes(
    place: Path, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, model: PreTrainedModel
) -> None:
    asked: dict[str, Any] = {
        "method": "wanda", "sparsity": 0.5, "data": f"file:{place}/words.txt", "samples": 4, "length": 16,
        "windows": 2, "final_windows": 2, "population": 2, "iterations": 1, "top": 2,
    }  # fmt: skip
    found = pared.search(place / "llama", tmp_path / "by name", **asked)
    loaded = pared.search(pared.load(place / "llama"), tmp_path / "loaded", tokenizer, **asked)
    assert found.program == loaded.program
    assert found.told["settings"]["calibration samples"] == 4
    assert f"best program: {found.program}" in repr(found)
    assert pared.search(place / "llama", tmp_path / "by name", **asked).told == found.told


def test_perplexity_is_the_same_however_it_is_asked_for(
    place: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    rows = [WORDS[:1000], WORDS[1000:]]
    (place / "rows.txt").write_text("\n\n".join(rows))
    name = f"file:{place}/rows.txt"
    cut: dict[str, Any] = {"length": 32, "windows": 3}
    expected = pared.perplexity(model, tokenizer, name, **cut).value
    assert pared.perplexity(model, tokenizer, rows, **cut).value == expected
    assert pared.perplexity(model, tokenizer, datasets.Dataset.from_dict({"text": rows}), **cut).value == expected
    found = [
        pared.evaluate(place / "llama", perplexity=name, **cut),
        pared.evaluate(model, tokenizer, perplexity=rows, **cut),
        pared.evaluate(model, tokenizer, pared.EvaluationConfig(perplexity=name), **cut),
        pared.evaluate(place / "llama", None, {"perplexity": name, "length": 32}, windows=3),
    ]
    assert [one.figures["perplexity"] for one in found] == [expected] * 4
    assert [one.measure for one in found] == ["perplexity"] * 4
    assert f"{expected:,.4f}" in repr(found[0])
    assert not model.training


def test_a_loaded_encoder_labels_examples_as_one_by_name(
    place: Path, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    encoder = TINY_MODELS["bert"]()
    encoder.save_pretrained(tmp_path / "bert")
    tokenizer.save_pretrained(tmp_path / "bert")
    (tmp_path / "rows.jsonl").write_text("".join(f'{{"text": "w{one} w5", "label": {one % 3}}}\n' for one in range(9)))
    asked = f"file:{tmp_path}/rows.jsonl"
    loaded, named = (
        pared.evaluate(encoder, tokenizer, examples=asked),
        pared.evaluate(tmp_path / "bert", examples=asked),
    )
    assert loaded.figures == named.figures
    assert "9 examples" in " ".join(repr(loaded).split())  # lines break where the path of the examples ends


# How results are shown.


def shown(place: Path, tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    result = pared.compress(TINY_MODELS["llama"](), tokenizer, method="svd", keep=0.5)
    return {
        "plan": pared.plan(place / "llama", method="svd", keep=0.5),
        "compressed": result,
        "perplexity": pared.perplexity(TINY_MODELS["llama"](), tokenizer, f"file:{place}/words.txt", 32, 2),
    }


def test_results_are_shown_as_tables_of_80_columns_and_in_html(
    place: Path, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    results = shown(place, tokenizer)
    expected = {"plan": "target parameters", "compressed": "not saved yet", "perplexity": "predicted tokens"}
    results["saved"] = results["compressed"].save(tmp_path / "made")
    expected["compressed"] = expected["saved"] = "self-check: reloaded"
    for name, result in results.items():
        text, html = repr(result), result._repr_html_()
        assert expected[name] in text
        assert expected[name] in html
        assert str(result) == text
        assert "\x1b" not in text
        assert max(map(len, text.splitlines())) <= 80, text
        assert html.count("<table>") == html.count("</table>") == 1
    assert repr(results["compressed"]) == repr(results["saved"])


def test_a_manifest_is_strict_and_read_by_the_name_of_its_folder(place: Path) -> None:
    """Regression: a TypeError for a string, and the one public schema that could be changed."""
    manifest = pared.Manifest.read(str(place / "small"))
    assert manifest == pared.Manifest.read(place / "small")
    with pytest.raises(pared.ParedError, match="a Manifest is frozen"):
        manifest.self_check = 0.0
    with pytest.raises(pared.ParedError, match="unknown key 'formt_version'; did you mean 'format_version'"):
        pared.Manifest(formt_version=1)  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"tokenizer": 3}, "needs the model's tokenizer to read text, got 3"),
        ({"tokenizer": "words"}, r"takes a loaded tokenizer, got the name 'words'; load it first"),
        ({"collected": 3}, "takes the folder of collected statistics, got 3"),
    ],
)
def test_what_is_given_beside_a_model_by_name_is_checked(given: dict[str, Any], told: str, place: Path) -> None:
    """Regression: a TypeError deep inside, after the model was loaded."""
    with pytest.raises(pared.ParedError, match=f"pared.compress {told}"):
        pared.compress(place / "llama", method="svd-llm", **given)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"tasks": 3}, "expected names, in a list or in one text with commas; got 3"),
        ({"tasks": "arc_easy", "limit": True}, "limit: expected a valid integer; got True"),
        ({"perplexity": "embedded", "length": "32"}, "length: expected a valid integer; got '32'"),
        ({"perplexity": "embedded", "tokenizer": 3}, "loads the tokenizer of a model by name with it; .* got 3"),
    ],
)
def test_what_cannot_be_evaluated_with_is_refused(given: dict[str, Any], told: str, place: Path) -> None:
    """Regression: a TypeError, or taken for something else, or ignored."""
    with pytest.raises(pared.ParedError, match=told):
        pared.evaluate(place / "small", **given)


def test_a_search_on_texts_of_python_is_refused_by_the_name_of_the_field(place: Path, tmp_path: Path) -> None:
    """Regression: told of a calibration's text, which was not given."""
    with pytest.raises(pared.ParedError, match=r"pared\.search takes data by name: .*; got a list"):
        pared.search(place / "llama", tmp_path / "found", method="wanda", sparsity=0.5, data=[WORDS])


def test_a_plan_is_titled_by_its_budget(model: PreTrainedModel) -> None:
    """Regression: keep, whatever the budget was."""
    for budget, title in (
        ({"method": "svd", "keep": 0.5}, "plan, keep 0.5"),
        ({"method": "magnitude", "sparsity": 0.3}, "plan, sparsity 0.3"),
        ({"method": "magnitude", "pattern": "2:4"}, "plan, pattern 2:4"),
    ):
        assert pared.plan(model, **budget).table().title == title
