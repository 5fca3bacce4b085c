"""Commands that the pages show: each can be parsed, without being run."""

import re
import shlex
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import typer

from pared.cli.commands import COMMANDS, LazyCommands

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
Refused = typer.BadParameter.__mro__[2]  # click's, or that of the click that typer brings
WITHOUT_COMMANDS = {"--version", "--help", "--install-completion"}


def shown(page: str) -> list[str]:
    """Return the commands in a page's blocks, also behind a launcher, continued lines put together."""
    blocks = re.findall(r"^```(?:bash|console)?\n(.*?)^```", page, flags=re.DOTALL | re.MULTILINE)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    found = (
        re.match(r"(?:\$ )?(?:pared|(?:torchrun|accelerate launch) .*?-m pared(?:\.cli\.main)?) (.*)", line)
        for line in lines
    )
    return [one[1] for one in found if one]


def named(page: str) -> list[str]:
    """Return the commands that a page names in its text; three dots are what stands above, a compression."""
    text = re.sub(r"^```.*?^```", "", page, flags=re.DOTALL | re.MULTILINE)
    spans = (" ".join(span.split()) for span in re.findall(r"`([^`]+)`", text))
    spans = (re.sub(r"^\.\.\. (?=--)", "pared compress ", span) for span in spans)
    return [span.removeprefix("pared ") for span in spans if re.match(r"pared [a-z-]", span)]


@cache
def called(name: str) -> Any:
    """Return the command of a name, None if there is none."""
    return LazyCommands(name="pared").get_command(None, name)


def command_of(words: list[str]) -> tuple[Any, list[str]]:
    """Return the command that words begin with, and what is left of them."""
    command = called(words[0])
    assert command is not None, f"no command {words[0]}"
    if hasattr(command, "commands") and words[1:]:
        return command.commands[words[1]], words[2:]
    return command, words[1:]


def parse(text: str) -> None:
    """Parse a command as typer does, without running it.

    Raises:
        BadParameter: it would be refused.
    """
    words = shlex.split(text, comments=True)
    if words[0] in WITHOUT_COMMANDS:
        return
    command, rest = command_of(words)
    command.make_context(words[0], rest)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_commands_of_a_page_can_be_parsed(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # whether a file that a command is to write can be is looked at
    text = page.read_text(encoding="utf-8")
    wrong = []
    for command in shown(text):
        try:
            parse(command)
        except (Refused, AssertionError, KeyError) as error:
            wrong.append(f"pared {command}: {error}")
    for command in named(text):
        words = shlex.split(command)
        if words[0] in WITHOUT_COMMANDS or not words[0].islower():
            continue
        try:
            known = {flag for one in command_of(words)[0].params for flag in (*one.opts, *one.secondary_opts)}
            strange = {word for word in words if word.startswith("--")} - known - WITHOUT_COMMANDS
            assert not strange, f"no option {', '.join(sorted(strange))}"
        except (AssertionError, KeyError) as error:
            wrong.append(f"`pared {command}`: {error}")
    assert not wrong, "\n".join(wrong)


def test_pages_show_every_command() -> None:
    pages = [page.read_text(encoding="utf-8") for page in PAGES]
    seen = {shlex.split(one, comments=True)[0] for page in pages for one in (*shown(page), *named(page))}
    assert set(COMMANDS) <= seen
    assert sum(len(shown(page)) for page in pages) > 40


@pytest.mark.parametrize(
    "wrong",
    [
        "compress MODEL --kep 0.8",
        "compress MODEL --keep much",
        "compress MODEL OTHER",
        "info",
        "conpress MODEL",
        "plan MODEL --keep",
    ],
)
def test_a_wrong_command_is_noticed(wrong: str) -> None:
    with pytest.raises((Refused, AssertionError)):
        parse(wrong)
