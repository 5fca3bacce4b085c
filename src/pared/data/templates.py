"""Prompts: an instruction put into a template, which is data."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import yaml

from pared.names import require_known

FILE = Path(__file__).with_name("templates.yaml")


@dataclass(frozen=True)
class Template:
    """How an instruction becomes a prompt.

    Attributes:
        plain: the form of an instruction alone; ``{instruction}`` stands for it.
        with_input: the form of an instruction with an input, ``{input}``; none puts the input after the
            instruction, in a paragraph of its own.
        split_lines: whether the lines after the first are the input of an instruction that has none beside it.
    """

    plain: str
    with_input: str | None = None
    split_lines: bool = False


@cache
def templates() -> Mapping[str, Template]:
    """Return the templates by name."""
    return {name: Template(**form) for name, form in yaml.safe_load(FILE.read_text(encoding="utf-8")).items()}


def prompt(template: str, instruction: str, beside: str = "") -> str:
    """Return the prompt of an instruction and an input beside it.

    Raises:
        ParedError: there is no template of that name.
    """
    require_known("template", template, templates())
    form = templates()[template]
    if form.split_lines and not beside:
        instruction, _, beside = instruction.partition("\n")
    if beside and form.with_input is not None:
        return _filled(form.with_input, instruction, beside)
    return _filled(form.plain, f"{instruction}\n\n{beside}" if beside else instruction, "")


def _filled(form: str, instruction: str, beside: str) -> str:
    """Put both in; braces in them are text."""
    before, _, after = form.partition("{instruction}")
    return before + instruction + after.replace("{input}", beside, 1)
