"""A page in one file, which needs no network: sections of figures, tables, maps and code, for a screen or on paper."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any

from pared.schema.compare import ComparedModels
from pared.tables import Table

if TYPE_CHECKING:
    from jinja2 import Template


@dataclass(frozen=True)
class Picture:
    """A figure in a page.

    Attributes:
        svg: as :func:`pared.report.plots.inline` makes it.
        caption: below it.
    """

    svg: str
    caption: str


@dataclass(frozen=True)
class Bar:
    """One of several sizes that are compared with that of the dense model.

    Attributes:
        name: of the model.
        value: its size, to print.
        share: of the dense model's, 0 to 1.
    """

    name: str
    value: str
    share: float


@dataclass(frozen=True)
class Bars:
    """Sizes of several models."""

    title: str
    rows: Sequence[Bar]


@dataclass(frozen=True)
class Cell:
    """What stays of one layer.

    Attributes:
        share: of its parameters, 0 to 1.
        shown: in the cell.
        told: the decision in words.
    """

    share: float
    shown: str
    told: str


@dataclass(frozen=True)
class MapRow:
    """The layers of one block, None where it has none of a kind."""

    block: str
    cells: Sequence[Cell | None]


@dataclass(frozen=True)
class Map:
    """What stays of every layer of a model: a row for every block, a column for every kind of layer."""

    title: str
    caption: str
    columns: Sequence[str]
    rows: Sequence[MapRow]


@dataclass(frozen=True)
class Block:
    """Lines and code under a heading of their own."""

    title: str
    text: Sequence[str] = ()
    code: str = ""


@dataclass(frozen=True)
class Section:
    """A part of a page; what is empty is left out.

    Attributes:
        id: its anchor.
        title: its heading.
        text: paragraphs.
        figures: side by side where there is room.
        tables: below them.
        bars: sizes.
        maps: of models.
        blocks: with headings of their own.
    """

    id: str
    title: str
    text: Sequence[str] = ()
    figures: Sequence[Picture] = ()
    tables: Sequence[Table] = ()
    bars: Sequence[Bars] = ()
    maps: Sequence[Map] = ()
    blocks: Sequence[Block] = field(default=())


def page(title: str, lead: str, sections: Sequence[Section]) -> str:
    """Return a page of HTML; every text in it is escaped.

    Args:
        title: of the page.
        lead: below it.
        sections: in order.
    """
    return _template().render(title=title, lead=lead, sections=sections)


def comparison_page(found: ComparedModels) -> str:
    """Return the page of a comparison."""
    names = ", ".join(one.name for one in found.models)
    return page(f"Comparison of {names}", "Made by pared compare.", comparison_sections(found))


def comparison_sections(found: ComparedModels) -> list[Section]:
    """Return the figures of models, and how each continues a prompt."""
    figures, *said = found.tables()
    sections = [Section("figures", "Figures", tables=[figures])]
    if any(table.rows for table in said):
        text = [f"{found.new_tokens} tokens each, the likeliest every time."]
        sections.append(Section("generations", "Generations side by side", text, tables=said))
    return sections


@cache
def _template() -> "Template":
    from jinja2 import Environment, PackageLoader, StrictUndefined

    loader: Any = PackageLoader("pared.report", "templates")
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    return environment.get_template("page.html")
