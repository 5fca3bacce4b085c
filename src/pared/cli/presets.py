"""``pared presets``: protocols of papers by name."""

from typing import Annotated

import typer
from rich.table import Table

from pared.schema.presets import load_preset, preset_names, read_preset, to_markdown


def presets(
    name: Annotated[str | None, typer.Argument(help="Print this one, as its file has it.", show_default=False)] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print docs/presets.md.")] = False,
) -> None:
    """List the protocols that `--preset` knows, or print one with what its paper says."""
    from pared.cli.console import errors, out

    with errors():
        if markdown or name is not None:
            typer.echo(to_markdown() if name is None else read_preset(name), nl=False)
            return
        table = Table(header_style="bold")
        for column in ("preset", "for", "what", "source"):
            table.add_column(column, overflow="fold", no_wrap=column == "preset")
        for one in map(load_preset, preset_names()):
            table.add_row(one.name, one.command, one.summary, one.source.partition(";")[0])
        out.print(table)
