"""The entry point: collects the commands."""

import logging
import signal
from typing import Annotated

import typer

from pared import __version__
from pared.cli.bench import bench
from pared.cli.compress import compress
from pared.cli.convert import convert
from pared.cli.demo import demo
from pared.cli.diagnose import diagnose
from pared.cli.evaluate import evaluate
from pared.cli.export import export
from pared.cli.info import info
from pared.cli.methods import methods
from pared.cli.plan import plan
from pared.cli.presets import presets
from pared.cli.search import search
from pared.cli.tune import tune
from pared.cli.verify import verify

app = typer.Typer(
    name="pared",
    help="Make language models smaller and hand them back as ordinary Hugging Face checkpoints.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # "[default: ...]" is text here, not a style
)
app.command()(compress)
app.command()(plan)
app.command("eval")(evaluate)
app.command()(verify)
app.command()(info)
app.command()(methods)
app.command()(presets)
app.command()(export)
app.command()(convert)
app.command()(search)
app.command()(tune)
app.command()(bench)
app.command()(demo)
app.add_typer(diagnose, name="diagnose")


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"pared {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    _: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", help="Say more, such as which statistics were damped.")] = False,
) -> None:
    logging.basicConfig(format="note: %(message)s")
    logging.getLogger("pared").setLevel(logging.INFO if verbose else logging.WARNING)
    logging.getLogger("pared.sources").setLevel(logging.INFO)


def main() -> None:
    """Run the command line; a termination is handled like Ctrl-C, so that nothing half-made stays."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    app()


if __name__ == "__main__":
    main()
