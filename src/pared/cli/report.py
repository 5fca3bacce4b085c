"""``pared report``: a page on folders."""

from pathlib import Path
from typing import Annotated

import typer

from pared.cli.console import ConsoleProgress, errors, out, quiet_libraries
from pared.cli.options import Overwrite
from pared.report.plots import require_plotting


def report(
    folders: Annotated[list[str], typer.Argument(help="Folders that pared made.")],
    page: Annotated[Path, typer.Option("--out", help="The file to make.")] = Path("report.html"),
    prompt: Annotated[
        list[str] | None, typer.Option(help="Text that every model continues. Repeatable. [default: three short ones]")
    ] = None,
    new_tokens: Annotated[int, typer.Option(help="Tokens of each continuation; 0 loads no weights.")] = 32,
    device: Annotated[str, typer.Option(help="Where they run; auto takes the GPU (CUDA) where there is one.")] = "auto",
    overwrite: Overwrite = False,
) -> None:
    """Write a page on folders that pared made: one file, which needs no network."""
    with errors():
        quiet_libraries()
        require_plotting("pared report")
        from pared.entrypoints.compare import PROMPTS
        from pared.entrypoints.report import report as write

        written = write(folders, page, PROMPTS if prompt is None else prompt, new_tokens, overwrite, ConsoleProgress(),
                        device=device)  # fmt: skip
        out.print(f"report: {written}")
