"""What messages call a field: as their reader writes it, in Python or on the command line."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import pared
from pared.names import OPTIONS, called, option_called, told_in_flags
from pared.schema.command_line import declared
from pared.schema.recipe import Recipe

SOURCE = Path(pared.__file__).parent
FLAG = re.compile(r"(?<![\w-])--[a-z][a-z-]*")
# Whole commands, which are the same wherever they are read, to the end of what stands behind them.
COMMANDS = re.compile(r"(accelerate launch|torchrun|pip install|ray start|pared (export|compress|verify))[^;:)]*")
# What says both ways itself, what only a command calls, what quotes papers, and what is help.
OF_COMMANDS = {
    "names.py",
    "schema/presets.py",
    "report/search_trace.py",
    "schema/recipe.py",
    "entrypoints/evaluation/kept_results.py",
    "training/distributed.py",
}


def texts_of(file: Path) -> Iterator[tuple[int, str]]:
    """Yield all texts of a module but those that stand by themselves, which document it."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    alone = {id(one.value) for one in ast.walk(tree) if isinstance(one, ast.Expr)}
    joined = [one for one in ast.walk(tree) if isinstance(one, ast.JoinedStr)]
    parts = {id(part) for one in joined for part in one.values}
    for one in joined:
        yield one.lineno, "".join(str(part.value) if isinstance(part, ast.Constant) else "{}" for part in one.values)
    for one in ast.walk(tree):
        if isinstance(one, ast.Constant) and isinstance(one.value, str) and id(one) not in alone | parts:
            yield one.lineno, one.value


def test_no_message_outside_the_command_line_names_options() -> None:
    """They read ``--option targets=...`` in Python too, where that is ``options={'targets': ...}``."""
    found = []
    for file in sorted(SOURCE.rglob("*.py")):
        name = file.relative_to(SOURCE).as_posix()
        if name.startswith("cli/") or name in OF_COMMANDS:
            continue
        for line, text in texts_of(file):
            flags = FLAG.findall(COMMANDS.sub("", text))
            if flags and not FLAG.fullmatch(text):  # a flag alone is a declaration: Option("--data")
                found.append(f"{name}:{line}: {' '.join(flags)}")
    assert found == [], "\n".join(found)


def test_options_are_called_by_the_names_that_they_are_declared_with() -> None:
    flags = {one.key: one.flag for one in declared(Recipe)}
    assert {field: f"--{option}" for field, option in OPTIONS.items()} == {field: flags[field] for field in OPTIONS}


@pytest.mark.parametrize(
    ("arguments", "python", "command"),
    [
        (("targets", "*.q_proj"), "options={'targets': '*.q_proj'}", "--option targets=*.q_proj"),
        (("new", "8"), "options={'new': 8}", "--option new=8"),
        (
            ("program", "found/FOUND.json", "allocation_options"),
            "allocation_options={'program': 'found/FOUND.json'}",
            "--allocation-option program=found/FOUND.json",
        ),
    ],
)
def test_an_option_is_called_as_its_reader_gives_it(arguments: tuple[str, ...], python: str, command: str) -> None:
    assert option_called(*arguments) == python
    with told_in_flags():
        assert option_called(*arguments) == command


def test_a_field_with_an_option_of_another_name_is_called_by_it() -> None:
    assert called("evaluation.length") == "evaluation.length"
    with told_in_flags():
        assert called("evaluation.length", "64") == "--eval-length 64"
