"""What every command shares: printing, progress, JSON files, and one clear line for an error."""

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as RichProgress

from pared.errors import ParedError
from pared.importing import when_imported
from pared.io.files import why_not_written, write_to
from pared.memory import lacks_memory
from pared.names import told_in_flags
from pared.processes import is_told_here, speaks
from pared.tables import Table

if TYPE_CHECKING:
    from pared.progress import Advance, Pace

# What is printed is text, of users and of libraries: NAME:train:text is no train, and pared[ray] no style.
out = Console(soft_wrap=True, markup=False, highlight=False, emoji=False)
err = Console(stderr=True, soft_wrap=True, markup=False, highlight=False, emoji=False)


LOG_EVERY_SECONDS = 10.0
LESS_MEMORY = "less is taken by a smaller --batch or --length, by --stream on (one block at a time) and by --device cpu"


class ConsoleProgress:
    """Bars with rate and remaining time on a terminal, plain lines now and then in a log."""

    @contextmanager
    def stage(self, name: str, total: int, unit: str) -> "Iterator[Advance]":
        """Open a stage of ``total`` steps."""
        with (_bar if err.is_terminal else _lines)(name, total, unit) as advance:
            yield advance

    def note(self, message: str) -> None:
        """Print a note."""
        err.print(f"note: {message}")


@contextmanager
def _bar(name: str, total: int, unit: str) -> "Iterator[Advance]":
    from pared.progress import Pace

    what, rate = TextColumn("{task.description}", markup=False), TextColumn("{task.fields[rate]}", markup=False)
    columns = (what, BarColumn(), MofNCompleteColumn(), rate, TimeElapsedColumn())
    with RichProgress(*columns, console=err) as bar:
        task, pace = bar.add_task(name, total=total, rate=""), Pace(total)

        def advance(told: str = "", recalled: bool = False) -> None:
            pace.step(recalled)
            bar.update(task, advance=1, rate=_told(pace, f" {unit}", told))

        yield advance


@contextmanager
def _lines(name: str, total: int, unit: str) -> "Iterator[Advance]":
    from pared.progress import Pace

    start = printed = time.perf_counter()
    pace = Pace(total)

    def advance(told: str = "", recalled: bool = False) -> None:
        nonlocal printed
        pace.step(recalled)
        now = time.perf_counter()
        if now - printed >= LOG_EVERY_SECONDS and pace.done < total:
            printed = now
            err.print(f"{name}: {pace.done}/{total} {unit}, {_told(pace, '', told)}")

    yield advance
    err.print(f"{name}: {pace.done}/{total} {unit} in {time.perf_counter() - start:.1f} s")


def _told(pace: "Pace", unit: str, told: str) -> str:
    """Return rate and time left, if they are known, and what else is to be shown."""
    known = pace.rate is not None and pace.left is not None
    pieces = [f"{pace.rate:.2f}{unit}/s", f"{pace.left:.0f} s left"] if known else []
    return ", ".join([*pieces, *([told] if told else [])])


@contextmanager
def errors(left: str = "no partial output is left") -> Iterator[None]:
    """Turn what a user did wrong, or a lack of memory, into one line and exit code 2, and Ctrl-C into 130.

    Args:
        left: what there is of the work then.
    """
    try:
        with told_in_flags():
            yield
    except ParedError as error:
        if speaks():
            err.print(f"error: {error}", style="red", markup=False)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        if is_told_here():
            err.print(f"interrupted; {left}")
        raise SystemExit(130) from None
    except Exception as error:
        if not lacks_memory(error):
            raise
        if speaks():
            what = " ".join(str(error).split())[:200] or type(error).__name__
            err.print(f"error: out of memory ({what}); {left}; {LESS_MEMORY}", style="red", markup=False)
        raise SystemExit(2) from None


def _writable(param: typer.CallbackParam, path: Path | None) -> Path | None:
    """Refuse a file that could not be written before the work it would report is done."""
    if path is not None:
        with errors():
            if (why := why_not_written(path)) is not None:
                raise ParedError(f"{param.opts[0]} {str(path)[:200]}: {why}")
    return path


JsonFile = Annotated[
    Path | None, typer.Option("--json", help="Also write the result to this file as JSON.", callback=_writable)
]
LmEvalFile = Annotated[
    Path | None,
    typer.Option("--lm-eval-json", help="Also write it in the layout of lm-evaluation-harness.", callback=_writable),
]


def print_result(table: Table) -> None:
    """Print a result as Python shows it: its table, and the lines below."""
    out.print(table.as_rich())
    for line in table.lines:
        out.print(line)


def write_json(path: Path | None, result: dict[str, Any], option: str = "--json") -> None:
    """Write a result where an option says: a file whole or not at all, and into what is none."""
    if path is None:
        return
    try:
        write_to(path, json.dumps(result, indent=2) + "\n")
    except OSError as error:
        raise ParedError(f"{option} {path}: {error.strerror or error}") from None


def quiet_libraries() -> None:
    """Keep the progress bars of other libraries out of the output, once they are imported."""
    when_imported("transformers.utils.logging", _quieten)


def _quieten(logging: Any) -> None:
    logging.disable_progress_bar()
    if not sys.flags.dev_mode:
        logging.set_verbosity_error()
