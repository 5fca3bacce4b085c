"""One calibration, every budget: each point is the plan that a compression makes, and the model is put back."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import TINY_MODELS
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

import pared
from pared import ExploreConfig, ParedError, Recipe
from pared.cli.commands import app
from pared.engine.checks.explorable import recipe_of
from pared.entrypoints.explore import _evenly, ideal_speed
from pared.schema.command_line import as_words
from pared.schema.explore import STRUCTURES, Exploration

KEEPS = (0.9, 0.5)


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Few windows of a text of random words."""
    text = tmp_path_factory.mktemp("text") / "words.txt"
    generator = torch.Generator().manual_seed(0)
    text.write_text(" ".join(f"w{int(one)}" for one in torch.randint(64, (2000,), generator=generator)))
    return {
        "calibration": {"text": f"file:{text}", "samples": 7, "length": 16, "batch": 3, "dtype": "float32"},
        "evaluation": {"text": f"file:{text}", "length": 16, "windows": 3},
        "multiple_of": 1,
    }


@pytest.fixture(scope="module")
def found(settings: dict[str, Any], tokenizer: PreTrainedTokenizerFast) -> tuple[pared.Explored, bool]:
    """An exploration of a tiny model, and whether that was the same bits afterwards."""
    model = _tiny()
    before = {name: one.clone() for name, one in model.state_dict().items()}
    found = pared.explore(model, tokenizer, settings, keep=KEEPS, measure=2)
    after = model.state_dict()
    return found, before.keys() == after.keys() and all(torch.equal(after[name], before[name]) for name in before)


def _tiny() -> Any:
    torch.manual_seed(0)
    return TINY_MODELS["llama"]()


def test_the_model_is_the_same_bits_afterwards(found: tuple[pared.Explored, bool]) -> None:
    assert found[1]


@pytest.mark.parametrize("structure", STRUCTURES)
def test_a_point_is_what_a_compression_to_it_decides(
    structure: str, found: tuple[pared.Explored, bool], tokenizer: PreTrainedTokenizerFast
) -> None:
    exploration, _ = found
    point = exploration.curve(structure)[0]
    recipe = recipe_of(exploration.recipe, structure, point.keep, exploration.config.pruner)
    made = pared.compress(_tiny(), tokenizer, recipe)
    after = made.plan.after
    sizes = (after.covered_parameters, after.model_parameters)
    if structure != "zeros":  # how many are stored is known once they are pruned
        assert (point.target_parameters, point.model_parameters) == sizes
        assert point.bytes_on_disk == after.bytes_on_disk
    assert point.target_parameters == pytest.approx(after.covered_parameters, rel=0.05)
    on = exploration.recipe.evaluation
    assert on is not None
    measured = pared.perplexity(made.model, tokenizer, on.text, on.length, on.windows)
    assert point.perplexity == pytest.approx(measured.value, rel=1e-4), "measured as it would be compressed"


def test_less_is_never_predicted_to_lose_less(found: tuple[pared.Explored, bool]) -> None:
    for structure in STRUCTURES:
        losses = [point.loss for point in found[0].curve(structure)]
        assert losses == sorted(losses), structure
        assert losses[0] > 0


def test_mixed_loses_no_more_than_ranks(found: tuple[pared.Explored, bool]) -> None:
    for ranks, mixed in zip(found[0].curve("ranks"), found[0].curve("mixed"), strict=True):
        assert mixed.loss <= ranks.loss * (1 + 1e-9)


@pytest.mark.parametrize(("count", "places"), [(1, [2]), (2, [0, 4]), (3, [0, 2, 4]), (5, [0, 1, 2, 3, 4]), (9, 5)])
def test_what_is_measured_is_spread_evenly_from_end_to_end(count: int, places: Any) -> None:
    points: list[Any] = list(range(5))
    assert _evenly(points, count) == (points if places == 5 else places)


def test_the_record_is_read_back_as_it_was(found: tuple[pared.Explored, bool]) -> None:
    again = Exploration.model_validate_json(found[0].model_dump_json())
    assert again.model_dump() == found[0].model_dump()
    assert str(again) == str(found[0])
    assert "knee" in str(found[0]) or not found[0].knees


def test_a_picture_has_a_line_for_every_structure(found: tuple[pared.Explored, bool], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    found[0].plot(tmp_path / "a.svg")
    found[0].plot(tmp_path / "b.svg")
    text = (tmp_path / "a.svg").read_text(encoding="utf-8")
    assert all(f"{structure}, predicted" in text for structure in STRUCTURES)
    assert (tmp_path / "b.svg").read_text(encoding="utf-8") == text, "the same picture from the same figures"
    with pytest.raises(ParedError, match=r"\.svg, \.png or \.pdf"):
        found[0].plot(tmp_path / "c.doc")


@pytest.mark.parametrize("target", [{"target_bytes": 0.8}, {"target_speed": 1.2}, {"max_perplexity_ratio": 1.001}])
def test_what_is_picked_meets_the_target(
    target: dict[str, float], settings: dict[str, Any], tokenizer: PreTrainedTokenizerFast
) -> None:
    model = _tiny()
    asked: dict[str, Any] = dict(target)
    if "target_bytes" in target:
        asked = {"target_bytes": str(int(0.8 * sum(one.numel() * 4 for one in model.parameters())))}
    found = pared.explore(model, tokenizer, settings, keep=KEEPS, structures="ranks", **asked)
    point, recipe = found.pick, found.picked
    assert point is not None
    assert recipe is not None
    if "target_bytes" in target:
        assert 0.9 * int(asked["target_bytes"]) < point.bytes_on_disk <= int(asked["target_bytes"])
    elif "target_speed" in target:
        assert 1.2 <= point.speed < 1.3
    else:
        assert point.loss <= math.log(1.001)
    assert recipe.keep == point.keep
    assert recipe.structures == "ranks"


def test_a_target_out_of_reach_says_what_is_in_reach(
    settings: dict[str, Any], tokenizer: PreTrainedTokenizerFast
) -> None:
    with pytest.raises(ParedError, match=r"out of reach: at keep .* the smallest has"):
        pared.explore(_tiny(), tokenizer, settings, keep=KEEPS, structures="ranks", target_bytes="1kB")


def test_zeros_make_nothing_faster_and_a_head_of_its_own_is_counted() -> None:
    plan = pared.plan(_tiny(), keep=0.5)
    saved = plan.before.covered_parameters - plan.after.covered_parameters
    assert ideal_speed(plan, 0) == plan.model_parameters / (plan.model_parameters - saved)
    assert ideal_speed(plan, 1000) > ideal_speed(plan, 0)
    assert ideal_speed(pared.plan(_tiny(), method="magnitude", sparsity=0.5), 0) == 1


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"method": "svd-llm"}, "losses that cannot be added up"),
        ({"structures": "rank"}, "ranks"),
        ({"keep": (1.5,)}, "keep"),
        ({"max_perplexity_ratio": 1.1, "target_speed": 2.0}, "each pick a budget"),
        ({"target_bytes": "much"}, "expected a size"),
        ({"pruner": "svd"}, "does not prune"),
    ],
)
def test_what_cannot_be_explored_is_refused(
    fields: dict[str, Any], told: str, settings: dict[str, Any], tokenizer: PreTrainedTokenizerFast
) -> None:
    with pytest.raises(ParedError, match=told):
        pared.explore(_tiny(), tokenizer, settings, **fields)


def test_the_command_prints_the_curve_and_the_command_for_what_it_picks(place: Path, tmp_path: Path) -> None:
    words = ["explore", str(place / "llama"), "--data", f"file:{place / 'words.txt'}", "--samples", "5", "--length",
             "16", "--calibration-dtype", "float32", "--eval", "none", "--structures", "ranks", "--keep", "0.9,0.7",
             "--target-speed", "1.1", "--json", str(tmp_path / "found.json")]  # fmt: skip
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    assert "ranks" in done.output
    assert "compress to it: pared compress" in done.output
    told = json.loads((tmp_path / "found.json").read_text(encoding="utf-8"))
    assert [point["keep"] for point in told["points"]] == [0.9, 0.7]


def test_the_words_of_a_recipe_ask_for_that_recipe() -> None:
    recipe = Recipe.of({"model": "a/b", "keep": 0.65, "skip": ["*.0.*"], "options": {"input_shrinkage": 0.1},
                        "refine": {"epochs": 3}, "calibration": {"samples": 7}, "evaluation": None})  # fmt: skip
    assert as_words(recipe) == ["a/b", "--keep", "0.65", "--skip", "*.0.*", "--refine", "--refine-epochs", "3",
                                "--option", "input_shrinkage=0.1", "--samples", "7", "--eval", "none"]  # fmt: skip
    assert as_words(ExploreConfig()) == []
