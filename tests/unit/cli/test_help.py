"""Help in groups, an example each, and what a shell completes."""

import json
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from pared.cli.commands import COMMANDS, GROUPS, LazyCommands, app


def output(*words: object, **variables: str) -> str:
    result = CliRunner(env=variables).invoke(app, [str(word) for word in words])
    assert result.exit_code == 0, result.output
    return result.output


def test_every_command_stands_in_one_group_with_an_example() -> None:
    listed = [name for names, _ in GROUPS.values() for name in names]
    assert sorted(listed) == sorted(COMMANDS)
    told = output("--help")
    for heading, (_, example) in GROUPS.items():
        assert f"{heading}:" in told
        assert example in " ".join(told.split())


@pytest.mark.parametrize("heading", GROUPS)
def test_examples_name_options_that_there_are(heading: str) -> None:
    names, example = GROUPS[heading]
    program, name, *words = shlex.split(example)
    assert program == "pared"
    assert name in names
    command = LazyCommands(name="pared").get_command(None, name)
    known = {flag for parameter in command.params for flag in (*parameter.opts, *parameter.secondary_opts)}
    assert {word for word in words if word.startswith("--")} <= known


def test_help_fits_a_terminal() -> None:
    assert max(map(len, output("--help", COLUMNS="80").splitlines())) <= 80


def test_a_shell_completes_commands_and_options() -> None:
    told = output(_PARED_COMPLETE="complete_bash", COMP_WORDS="pared do", COMP_CWORD="1")
    assert told.split() == ["doctor"]
    told = output(_PARED_COMPLETE="complete_bash", COMP_WORDS="pared push --pri", COMP_CWORD="2")
    assert told.split() == ["--private"]


def test_methods_are_written_as_json_with_their_options(tmp_path: Path) -> None:
    output("methods", "--json", tmp_path / "all.json")
    listed = json.loads((tmp_path / "all.json").read_text())
    assert listed.keys() == {"methods", "allocations", "trainings"}
    by_name = {one["name"]: one for one in listed["methods"]}
    assert by_name["svd-llm"]["calibrated"]
    assert {option["name"] for option in by_name["asvd"]["options"]}
    output("methods", "svd-llm", "--json", tmp_path / "one.json")
    one = json.loads((tmp_path / "one.json").read_text())
    assert [found["name"] for every in one.values() for found in every] == ["svd-llm"]
