"""Prompts: an instruction put into a template, which is data."""

from collections.abc import Mapping
from functools import cache
from pathlib import Path

import yaml

from pared.names import require_known

FILE = Path(__file__).with_name("templates.yaml")


@cache
def templates() -> Mapping[str, Mapping[str, str]]:
    """Return the templates by name, each with a form ``plain`` and perhaps one ``with_input``."""
    loaded: dict[str, dict[str, str]] = yaml.safe_load(FILE.read_text(encoding="utf-8"))
    return loaded


def prompt(template: str, instruction: str, beside: str = "") -> str:
    """Return the prompt of an instruction and perhaps an input beside it; an instruction may have several lines.

    Raises:
        ParedError: there is no template of that name.
    """
    require_known("template", template, templates())
    forms = templates()[template]
    if beside and "with_input" in forms:
        return _filled(forms["with_input"], instruction, beside)
    return _filled(forms["plain"], f"{instruction}\n\n{beside}" if beside else instruction, "")


def _filled(form: str, instruction: str, beside: str) -> str:
    """Put both in; braces in them are text."""
    before, _, after = form.partition("{instruction}")
    return before + instruction + after.replace("{input}", beside, 1)
