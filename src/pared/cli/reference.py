"""Tables of the documentation that are made from the declarations of options.

    python -m pared.cli.reference docs/*.md

rewrites them wherever a page has ``<!-- options: recipe -->`` above and ``<!-- end -->`` below.
"""

import re
import sys
from pathlib import Path

from pared.schema.base import Config
from pared.schema.command_line import Declared, declared
from pared.schema.evaluate import EvaluationConfig
from pared.schema.explore import ExploreConfig
from pared.schema.recipe import Recipe
from pared.schema.search import SearchConfig
from pared.schema.training import TrainingConfig

MODELS: dict[str, type[Config]] = {
    model.NOUN: model for model in (Recipe, TrainingConfig, SearchConfig, EvaluationConfig, ExploreConfig)
}
BLOCK = re.compile(r"(<!-- options: (\w+) -->\n).*?(<!-- end -->\n)", re.DOTALL)
KINDS = {dict: "mapping", list[str]: "list", bool: "flag", int: "whole number",
         float: "number", str: "text", Path: "path"}  # fmt: skip


def table(model: type[Config]) -> str:
    """Return every field of a model, as a key of the file and as an option, in Markdown."""
    lines = ["| key | option | value | default | what |", "|---|---|---|---|---|"]
    for one in declared(model):
        option = "" if one.option is None else "by position" if one.option.argument else f"`{one.flag}`"
        cells = (f"`{one.key}`", option, _value(one), one.default or _nothing(one), one.text)
        lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    return "\n".join(lines) + "\n"


def renewed(page: str) -> str:
    """Return a page with its tables of options as they are now."""
    return BLOCK.sub(lambda found: f"{found[1]}{table(MODELS[found[2]])}{found[3]}", page)


def _value(one: Declared) -> str:
    return ", ".join(f"`{choice}`" for choice in one.choices) or KINDS[one.kind]


def _nothing(one: Declared) -> str:
    return "off" if one.kind is bool else ""


if __name__ == "__main__":
    for path in map(Path, sys.argv[1:]):
        path.write_text(renewed(path.read_text(encoding="utf-8")), encoding="utf-8")
