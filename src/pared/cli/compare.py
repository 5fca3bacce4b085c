"""``pared compare``: models side by side."""

from pathlib import Path
from typing import Annotated

import typer

from pared.cli.console import ConsoleProgress, JsonFile, errors, print_result, quiet_libraries, write_json
from pared.errors import ParedError
from pared.io.files import write_to


def compare(
    models: Annotated[list[str], typer.Argument(help="Folders that pared made, or any named models.")],
    prompt: Annotated[
        list[str] | None, typer.Option(help="Text that every model continues. Repeatable. [default: three short ones]")
    ] = None,
    new_tokens: Annotated[int, typer.Option(help="Tokens of each continuation; 0 loads no weights.")] = 32,
    device: Annotated[str, typer.Option(help="Where they run; auto takes the GPU (CUDA) where there is one.")] = "auto",
    markdown: Annotated[Path | None, typer.Option("--markdown", help="Also write the tables to this file.")] = None,
    html: Annotated[Path | None, typer.Option("--html", help="Also write the tables to this page.")] = None,
    json_file: JsonFile = None,
) -> None:
    """Put models side by side: sizes, perplexity, tasks, speed, and how each continues a prompt."""
    with errors():
        quiet_libraries()
        from pared.entrypoints.compare import PROMPTS
        from pared.entrypoints.compare import compare as compared

        found = compared(models, PROMPTS if prompt is None else prompt, new_tokens, ConsoleProgress(), device=device)
        for table in found.tables():
            print_result(table)
        if markdown is not None:
            _write(markdown, found.as_markdown())
        if html is not None:
            from pared.report.page import comparison_page

            _write(html, comparison_page(found))
        write_json(json_file, found.model_dump(mode="json"))


def _write(path: Path, text: str) -> None:
    try:
        write_to(path, text)
    except OSError as error:
        raise ParedError(f"{path}: {error.strerror or error}") from None
