"""`pared doctor` and `pared push` as commands: their exit codes and what they write."""

import json
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

import pared
from pared import Recipe
from pared.cli.commands import app
from pared.entrypoints.doctor import Finding


@pytest.fixture(scope="module")
def made(place: Path) -> Path:
    pared.run(Recipe(model=str(place / "llama"), method="svd", keep=0.6, evaluation=None, out=str(place / "made")))
    return place / "made"


@pytest.fixture(autouse=True)
def _of_a_fine_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pared.entrypoints.doctor.environment", lambda: iter([Finding("python", "ok", "3.11")]))


def command(*words: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, [str(word) for word in words])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.output


def test_a_folder_that_loads_right_ends_with_0_and_one_that_does_not_with_1(made: Path, tmp_path: Path) -> None:
    code, told = command("doctor", made, "--json", tmp_path / "right.json")
    assert code == 0, told
    assert "loads right here" in told
    assert json.loads((tmp_path / "right.json").read_text())["loads_wrongly"] is False
    broken = shutil.copytree(made, tmp_path / "broken")
    (broken / "config.json").unlink()
    code, told = command("doctor", broken, "--json", tmp_path / "wrong.json")
    assert code == 1
    assert "would load wrongly here" in told
    assert "config.json is missing" in (tmp_path / "wrong.json").read_text()


def test_without_a_folder_the_environment_alone_is_told() -> None:
    code, told = command("doctor")
    assert code == 0
    assert "pared runs here" in told


def test_what_is_no_folder_is_an_error(tmp_path: Path) -> None:
    code, told = command("doctor", tmp_path / "none")
    assert code == 2
    assert "no such folder" in told


def test_a_dry_run_of_push_prints_sizes(made: Path) -> None:
    code, told = command("push", made, "someone/smaller", "--dry-run", "--private")
    assert code == 0, told
    assert "model.safetensors" in told
    assert "KiB would go to someone/smaller (private" in told
