"""What a compression is predicted to take is told by the command line and by Python alike."""

import json
from pathlib import Path
from typing import Any

import pytest
from tiny_models import TINY_MODELS
from typer.testing import CliRunner

import pared
from pared.cli.commands import app
from pared.engine.cost import measured

ASKED: dict[str, Any] = {"method": "svd-llm", "keep": 0.5, "samples": 4, "length": 32}


def costed(*args: Any, **fields: Any) -> Any:
    return pared.plan(*args, cost=True, **fields)


def test_the_command_line_and_python_predict_the_same(place: Path) -> None:
    data = f"file:{place / 'words.txt'}"
    found = pared.plan(place / "llama", machine="h100", data=data, evaluation=None, **ASKED)
    words = ["plan", place / "llama", "--machine", "h100", "--data", data, "--eval", "none", "--json", place / "x.json"]
    words += [word for name, value in ASKED.items() for word in (f"--{name}", value)]
    told = CliRunner().invoke(app, [str(word) for word in words])
    assert told.exit_code == 0, told.output
    assert "predicted cost" in told.output
    assert "computed from published figures" in told.output
    assert json.loads((place / "x.json").read_text())["cost"] == found.cost.model_dump(mode="json")  # type: ignore[attr-defined]
    assert "predicted cost" in str(found)


def test_a_loaded_model_is_predicted_as_one_by_name(place: Path) -> None:
    data = f"file:{place / 'words.txt'}"
    by_name = costed(place / "llama", machine="h100", data=data, evaluation=None, **ASKED).cost
    model = TINY_MODELS["llama"]()
    weights = [parameter.clone() for parameter in model.parameters()]
    loaded = costed(model, machine="h100", evaluation=None, **ASKED).cost
    assert loaded.seconds == by_name.seconds
    assert (loaded.memory, loaded.disk) == (by_name.memory, by_name.disk)
    assert all((one == other).all() for one, other in zip(weights, model.parameters(), strict=True))


def test_this_machine_is_measured_once_a_week(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PARED_CACHE", str(tmp_path))
    monkeypatch.setattr(measured, "ENOUGH", 0.0)
    model = TINY_MODELS["llama"]()
    first = costed(model, evaluation=None, **ASKED).cost
    assert not first.computed
    assert first.total > 0
    assert set(first.seconds) >= {"load", "walk", "solve", "save", "verify"}

    def refused(*_: Any) -> Any:
        raise AssertionError("measured again")

    monkeypatch.setattr(measured, "prepared", refused)
    assert costed(model, evaluation=None, **ASKED).cost.seconds == first.seconds


def test_a_text_that_is_not_there_is_taken_to_be_as_long_as_asked_for(place: Path) -> None:
    found = costed(place / "llama", machine="h100", data="file:nowhere.txt", evaluation=None, **ASKED).cost
    assert any("nowhere.txt" in note for note in found.notes)
    assert found.seconds["walk"] > 0


def test_an_unknown_machine_is_refused_with_those_there_are(place: Path) -> None:
    with pytest.raises(pared.ParedError, match="h100"):
        pared.plan(place / "llama", machine="abacus", **ASKED)


def test_a_plan_without_cost_has_none(place: Path) -> None:
    assert not hasattr(pared.plan(place / "llama", **ASKED), "cost")
