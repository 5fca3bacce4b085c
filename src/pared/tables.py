"""Results as tables: plain text at a prompt and HTML in a notebook, with the rows that the command line prints."""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import rich.table

WIDTH = 80  # columns of a terminal
NAMES = 50  # columns that the names of rows may take before they are broken


class Row(NamedTuple):
    """One line of a comparison: what, before, after, and after as a fraction of before where that means something."""

    what: str
    before: str
    after: str
    share: str


@dataclass(frozen=True)
class Table:
    """Rows under a title, and lines below them.

    Attributes:
        title: above the table.
        columns: their headings.
        rows: each with one string a column.
        lines: what is said below, a sentence each.
        align: of every column ``l`` or ``r``; the last letter holds for all that follow.
        faint_from: the first of the rows that are printed faintly; None for none.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    lines: Sequence[str] = ()
    align: str = "lr"
    faint_from: int | None = None

    def is_right(self, column: int) -> bool:
        """Whether the column of a number is aligned right."""
        return self.align[min(column, len(self.align) - 1)] == "r"

    @classmethod
    def comparison(cls, title: str, rows: Sequence[Row], lines: Sequence[str] = ()) -> "Table":
        """Return the table of before and after."""
        return cls(title, ("", "before", "after", ""), rows, lines)

    def as_rich(self) -> "rich.table.Table":
        """Return it as the command line prints it, without the lines below."""
        from rich.table import Table as RichTable
        from rich.text import Text

        table = RichTable(title=Text(self.title), title_justify="left", header_style="bold")
        for number, column in enumerate(self.columns):
            names = number == 0 and all(len(row[0]) <= NAMES for row in self.rows)
            table.add_column(
                Text(column), justify="right" if self.is_right(number) else "left", overflow="fold", no_wrap=names
            )
        for number, row in enumerate(self.rows):
            faint = self.faint_from is not None and number >= self.faint_from
            table.add_row(*map(Text, row), style="dim" if faint else None)
        return table

    def as_text(self, width: int = WIDTH) -> str:
        """Return it as plain text of at most so many columns."""
        from rich.console import Console

        console = Console(
            width=width, color_system=None, markup=False, highlight=False, emoji=False, force_terminal=False,
            force_jupyter=False,
        )  # fmt: skip
        with console.capture() as captured:
            if self.rows:
                console.print(self.as_rich())
            else:
                console.print(self.title)
            for line in self.lines:
                console.print(line)
        return "\n".join(line.rstrip() for line in captured.get().rstrip("\n").split("\n"))

    def as_markdown(self) -> str:
        """Return it in Markdown, bars of the texts escaped and each on one line."""

        def line(cells: Sequence[str]) -> str:
            return f"| {' | '.join(' '.join(cell.split()).replace('|', chr(92) + '|') for cell in cells)} |"

        marks = ("---:" if self.is_right(number) else "---" for number in range(len(self.columns)))
        table = [line(self.columns), f"|{'|'.join(marks)}|", *map(line, self.rows)] if self.rows else []
        parts = [f"**{self.title}**" if self.title else "", "\n".join(table), *self.lines]
        return "\n\n".join(part for part in parts if part)

    def as_html(self) -> str:
        """Return it as HTML, every string escaped."""
        head = "".join(f"<th>{escape(column)}</th>" for column in self.columns)
        body = "".join(
            f"<tr>{''.join(_cell(self.is_right(number), value) for number, value in enumerate(row))}</tr>"
            for row in self.rows
        )
        below = "".join(f"<p>{escape(line)}</p>" for line in self.lines)
        table = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>" if self.rows else ""
        return f"<p><b>{escape(self.title)}</b></p>{table}{below}"


def _cell(right: bool, value: str) -> str:
    return f'<td style="text-align: {"right" if right else "left"}">{escape(value)}</td>'


class Shown:
    """What is shown as a table wherever Python or a notebook shows a value."""

    def table(self) -> Table:
        """Return the table that shows it."""
        raise NotImplementedError

    def __repr__(self) -> str:
        return self.table().as_text()

    def __str__(self) -> str:
        return self.table().as_text()

    def _repr_html_(self) -> str:
        return self.table().as_html()
