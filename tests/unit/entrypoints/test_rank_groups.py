"""One group of every weight's directions out at a time; the model is measured, and put back bit by bit."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import TINY_MODELS
from tiny_tokenizer import tiny_tokenizer
from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification, PreTrainedModel
from typer.testing import CliRunner

from pared import ParedError, Recipe
from pared.cli.commands import app
from pared.data import Windows
from pared.entrypoints import rank_groups as diagnose
from pared.entrypoints.rank_groups import RankGroups, classification, rank_groups
from pared.structure import find_anatomy, weight_of
from pared.widths.registry import METHODS as WIDTHS
from unit.data.test_labelled import head

METHODS = ("svd", "fwsvd", "svd-llm", "loss-optimal")


@pytest.fixture
def recipe(text_file: Path) -> Any:
    def of(method: str = "svd", **fields: Any) -> Recipe:
        calibration = {"text": f"file:{text_file}", "samples": 5, "length": 16, "batch": 2, "dtype": "float32"}
        evaluation = {"text": f"file:{text_file}", "length": 16, "windows": 3}
        return Recipe.of({"method": method, "calibration": calibration, "evaluation": evaluation, **fields})

    return of


@pytest.fixture(scope="module")
def examples(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("examples") / "rows.jsonl"
    rows = [{"text": " ".join(f"w{3 + (7 * i + j) % 60}" for j in range(2 + i % 5)), "label": i % 3} for i in range(9)]
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return f"file:{path}"


def state(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(model: PreTrainedModel, before: dict[str, torch.Tensor]) -> bool:
    after = model.state_dict()
    return after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)


def watched(monkeypatch: pytest.MonkeyPatch, model: PreTrainedModel) -> list[dict[str, torch.Tensor]]:
    """Write the weights down whenever the model is measured."""
    seen: list[dict[str, torch.Tensor]] = []
    real = diagnose.perplexity

    def measure(*args: Any) -> Any:
        sites = find_anatomy(model).sites
        seen.append({site.name: weight_of(model.get_submodule(site.name)).detach().clone() for site in sites})
        return real(*args)

    monkeypatch.setattr(diagnose, "perplexity", measure)
    return seen


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_groups_together_are_the_weight(
    family: str, method: str, recipe: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = TINY_MODELS[family]()
    seen = watched(monkeypatch, model)
    found = rank_groups(model, tokenizer, recipe(method), 4)
    dense, parts = seen[0], seen[1:]
    assert len(parts) == len(found.groups) == 4
    for name, weight in dense.items():
        removed = [weight - part[name] for part in parts]
        assert float((sum(removed) - weight).norm()) < 1e-4 * float(weight.norm()), "nothing is left without them"
        for piece in removed:
            assert int((torch.linalg.svdvals(piece) > 1e-4).sum()) <= -(-min(weight.shape) // 4)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_weights_are_put_back_bit_by_bit(method: str, dtype: torch.dtype, recipe: Any, tokenizer: Any) -> None:
    model = TINY_MODELS["llama"]().to(dtype).train()
    before = state(model)
    rank_groups(model, tokenizer, recipe(method), 3)
    assert same(model, before)
    assert model.training


def test_the_weights_are_put_back_when_a_measurement_fails(
    recipe: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = TINY_MODELS["llama"]()
    before, calls = state(model), list[None]()
    real = diagnose.perplexity

    def fails(*args: Any) -> Any:
        calls.append(None)
        if len(calls) == 3:
            assert not same(model, before)
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(diagnose, "perplexity", fails)
    with pytest.raises(KeyboardInterrupt):
        rank_groups(model, tokenizer, recipe(), 4)
    assert same(model, before)


def test_the_first_group_is_the_largest_part_of_the_weights(recipe: Any, tokenizer: Any) -> None:
    found = rank_groups(TINY_MODELS["llama"](), tokenizer, recipe(), 4)
    errors = [group.error for group in found.groups]
    assert errors == sorted(errors, reverse=True)
    assert sum(error**2 for error in errors) == pytest.approx(1, abs=1e-6)
    assert [group.number for group in found.groups] == [1, 2, 3, 4]
    assert all(group.quality["perplexity"] != found.before["perplexity"] for group in found.groups)


def test_directions_a_model_does_not_use_cost_nothing(recipe: Any, tokenizer: Any) -> None:
    """Weights of half the rank: what lies beyond it can be taken out."""
    model = TINY_MODELS["llama"]()
    for site in find_anatomy(model).sites:
        weight = model.get_submodule(site.name).weight
        U, s, Vh = torch.linalg.svd(weight.detach(), full_matrices=False)
        half = min(weight.shape) // 2
        weight.data.copy_(U[:, :half] * s[:half] @ Vh[:half])
    found = rank_groups(model, tokenizer, recipe(), 4)
    losses = [abs(group.quality["perplexity"] - found.before["perplexity"]) for group in found.groups]
    assert max(losses[2:]) < 1e-3 * min(losses[:2])


@pytest.mark.parametrize("method", ["svd", "fwsvd"])
def test_a_classifier_is_measured_by_loss_and_accuracy(method: str, recipe: Any, tokenizer: Any, examples: str) -> None:
    model = head(AutoModelForSequenceClassification)
    before = state(model)
    asked = recipe(
        method,
        calibration={"text": examples, "samples": 9, "length": 16, "dtype": "float32"},
        evaluation={"text": examples, "length": 16},
    )
    found: RankGroups = rank_groups(model, tokenizer, asked, 4)
    assert found.evaluation["labels"] == 9
    assert (found.calibration is None) == (method == "svd")
    assert found.before.keys() == {"loss", "accuracy"}
    assert any(group.quality["loss"] != found.before["loss"] for group in found.groups)
    assert same(model, before)


def test_loss_and_accuracy_are_those_of_the_examples_one_by_one() -> None:
    random = torch.Generator().manual_seed(0)
    mask = (torch.arange(8) < torch.randint(1, 9, (11, 1), generator=random)).long()
    mask[0] = 1
    tokens = torch.randint(1, 64, mask.shape, generator=random) * mask
    for kind, shape in ((AutoModelForSequenceClassification, (11,)), (AutoModelForTokenClassification, (11, 8))):
        model = head(kind)
        labels = torch.randint(0, 3, shape, generator=random)
        labels = labels.masked_fill(mask == 0, -100) if labels.ndim == 2 else labels
        found = classification(model, Windows(tokens, "", "x", "here", False, mask, labels))
        losses, right = [], []
        for index in range(11):
            count = int(mask[index].sum())
            with torch.no_grad():
                log_p = model(input_ids=tokens[index : index + 1, :count]).logits.log_softmax(-1).flatten(0, -2)
            y = labels[index].reshape(-1)[:count]
            losses += (-log_p[torch.arange(len(y)), y]).tolist()
            right += (log_p.argmax(-1) == y).tolist()
        assert found["loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-5)
        assert found["accuracy"] == pytest.approx(sum(right) / len(right))


def test_what_cannot_be_diagnosed_is_refused(recipe: Any, tokenizer: Any, examples: str) -> None:
    llama, bert = TINY_MODELS["llama"](), head(AutoModelForTokenClassification)
    for model, asked, groups, told in (
        (llama, recipe(), 1, "at least 2 groups, got 1"),
        (llama, recipe(), 17, r"site model\.layers\.0\.self_attn\.k_proj 16 x 32 has 16 directions, too few for 17"),
        (llama, recipe(evaluation=None), 4, "nothing to measure quality on"),
        (llama, recipe(evaluation={}, calibration={"text": "alpaca"}), 4, "has no known held-out part"),
        (llama, recipe(skip=["*nothing*"]), 4, "matches none of"),
        (bert, recipe(evaluation={"text": "embedded"}), 4, "unknown labelled examples 'embedded'"),
        (bert, recipe(evaluation={"text": examples}), 4, "8 labels for .* one label an example fits a sequence"),
    ):
        with pytest.raises(ParedError, match=told):
            rank_groups(model, tokenizer, asked, groups)


@pytest.mark.parametrize("method", WIDTHS)
def test_a_method_without_directions_ran_the_calibration_and_died_by_an_assertion(
    method: str, recipe: Any, tokenizer: Any
) -> None:
    told = f"method {method} takes channels out and lowers no rank|structures experts takes whole experts out"
    with pytest.raises(ParedError, match=told):
        rank_groups(TINY_MODELS["llama"](), tokenizer, recipe(method, calibration={"text": "file:nowhere"}), 4)
    # No model of the name is there either: the method is refused before anything is looked for.
    refused = CliRunner().invoke(app, ["diagnose", "rank-groups", "nowhere", "--method", method])
    assert refused.exit_code == 2
    assert re.search(told, " ".join(refused.stderr.split()))


def test_the_command_prints_a_row_a_group_and_writes_json(tmp_path: Path, text_file: Path) -> None:
    TINY_MODELS["llama"]().save_pretrained(tmp_path / "tiny")
    tiny_tokenizer(64).save_pretrained(tmp_path / "tiny")
    words = ["diagnose", "rank-groups", str(tmp_path / "tiny"), "--method", "svd", "--groups", "4", "--eval",
             f"file:{text_file}", "--eval-length", "16", "--eval-windows", "2", "--json",
             str(tmp_path / "found.json")]  # fmt: skip
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.stderr
    assert "75%-100%" in result.stdout
    assert "perplexity" in result.stdout
    found = json.loads((tmp_path / "found.json").read_text())
    assert [group["number"] for group in found["groups"]] == [1, 2, 3, 4]
    assert found["before"]["perplexity"] > 1
    assert found["recipe"]["method"] == "svd"
    refused = CliRunner().invoke(app, [*words[:4], "nonsense", *words[5:]])
    assert refused.exit_code == 2
    assert "unknown method 'nonsense'" in refused.stderr
