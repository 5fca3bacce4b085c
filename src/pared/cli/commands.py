"""The commands, each imported when it is asked for."""

import logging
import pkgutil
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

# name -> (where it is, the first line of its help)
COMMANDS = {
    "compress": (
        "pared.cli.compress:compress",
        "Compress a model and write it as an ordinary Hugging Face folder, checked by reloading.",
    ),
    "plan": ("pared.cli.plan:plan", "Print what `pared compress` would do, without reading a single weight."),
    "explore": (
        "pared.cli.explore:explore",
        "Calibrate once, and show what every budget is predicted to cost; measure some, and pick one.",
    ),
    "compare": (
        "pared.cli.compare:compare",
        "Put models side by side: sizes, perplexity, tasks, speed, and how each continues a prompt.",
    ),
    "report": (
        "pared.cli.report:report",
        "Write a page on folders that pared made: one file, which needs no network.",
    ),
    "eval": (
        "pared.cli.evaluate:evaluate",
        "Measure a model: perplexity on a text, tasks, or how an encoder scores on labelled examples.",
    ),
    "verify": (
        "pared.cli.verify:verify",
        "Compare a folder's files with their recorded SHA-256, and its model's outputs with those recorded.",
    ),
    "info": ("pared.cli.info:info", "Print how a folder was made, its sizes and its ranks."),
    "methods": ("pared.cli.methods:methods", "List the methods, where each comes from and what it needs."),
    "presets": (
        "pared.cli.presets:presets",
        "List the protocols that `--preset` knows, or print one with what its paper says.",
    ),
    "export": ("pared.cli.export:export", "Write a model as a plain folder, a GGUF file or an ONNX graph."),
    "convert": (
        "pared.cli.convert:convert",
        "Store a folder in another form: pivoted (k² fewer parameters, no loss), two factors, plain, or in few bits.",
    ),
    "slice": (
        "pared.cli.slice:slice",
        "Cut a smaller size out of a folder of every size, in seconds and without data, checked by reloading.",
    ),
    "search": (
        "pared.cli.search:search",
        "Search for the program that allocates sparsity or ranks best.",
    ),
    "tune": (
        "pared.cli.tune:tune",
        "Train a compressed model, keeping its ranks and zeros; or, with basel, compress a dense one for a task.",
    ),
    "bench": ("pared.cli.bench:bench", "Measure tokens per second, time to the first token, memory and sizes."),
    "demo": (
        "pared.cli.demo:demo",
        "Compress the embedded model on the embedded text; a second run reuses what the first one made.",
    ),
    "diagnose": ("pared.cli.diagnose:diagnose", "Examine what a method does to a model."),
    "push": ("pared.cli.push:push", "Check a folder and upload the files that it lists to the Hugging Face Hub."),
    "doctor": (
        "pared.cli.doctor:doctor",
        "Say what this machine can do, and how it would load a folder; exit code 1 where it would load it wrongly.",
    ),
}
# heading -> (its commands, an example)
GROUPS = {
    "Make smaller": (
        ("compress", "slice", "explore", "plan", "search", "diagnose", "demo"),
        "pared compress MODEL --keep 0.8 --data wikitext2:train --out DIR",
    ),
    "Train": (("tune",), "pared tune DIR --method distill --data wikitext2:train --out BETTER"),
    "Measure": (("eval", "bench", "compare"), "pared bench DIR --against MODEL"),
    "Look and check": (("info", "verify", "doctor", "report"), "pared doctor DIR"),
    "Pass on": (("export", "convert", "push"), "pared push DIR owner/name --private --dry-run"),
    "What there is": (("methods", "presets"), "pared methods svd-llm"),
}
LOADS_NOTHING = {"methods", "presets", "demo"}
LOOKS: dict[str, Any] = {
    "pretty_exceptions_enable": False,
    "rich_markup_mode": None,  # "[default: ...]" is text here, not a style
}


class LazyCommands(TyperGroup):
    """Knows its commands by name and imports the one that is asked for."""

    def list_commands(self, ctx: Any) -> list[str]:  # noqa: ARG002 - as in click
        """Return the names of the commands, in the order of the help."""
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:  # noqa: ARG002 - as in click
        """Import a command."""
        if cmd_name not in COMMANDS:
            return None
        if self.commands.get(cmd_name) is None:
            self.commands[cmd_name] = _command(cmd_name)
        return self.commands[cmd_name]

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Find the command that is called; the nearest names are offered if there is none."""
        for name in COMMANDS:
            self.commands.setdefault(name, None)  # type: ignore[arg-type]
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: Any, formatter: Any) -> None:  # noqa: ARG002 - as in click
        """Write the list of commands in groups with an example each, importing none of them."""
        for heading, (names, example) in GROUPS.items():
            with formatter.section(heading):
                formatter.write_dl([(name, COMMANDS[name][1]) for name in names])
                formatter.write_paragraph()
                formatter.write_text(f"$ {example}")


def _command(name: str) -> Any:
    """Return a command, or a group of them, as click has it."""
    found = pkgutil.resolve_name(COMMANDS[name][0])
    if not isinstance(found, typer.Typer):
        found, function = typer.Typer(add_completion=False, **LOOKS), found
        found.command(name)(function)
    command = typer.main.get_command(found)
    command.name = name
    if name not in LOADS_NOTHING:
        _let_code_be_trusted(command)
    return command


def _let_code_be_trusted(command: Any) -> None:
    """Give a command, or those of a group, the option that lets code of a model's folder run."""
    for one in getattr(command, "commands", {}).values():
        _let_code_be_trusted(one)
    if not hasattr(command, "commands"):
        options = typer.Typer(add_completion=False)
        options.command()(_code_options)
        command.params += typer.main.get_command(options).params


def _trust(ctx: typer.Context, asked: bool) -> None:
    if asked:
        from pared.entrypoints.checks import trusting_everywhere

        ctx.with_resource(trusting_everywhere())


def _code_options(
    _: Annotated[
        bool,
        typer.Option("--trust-remote-code", callback=_trust, expose_value=False,
                     help="Run code that lies in a model's folder; read it before."),
    ] = False,
) -> None:  # fmt: skip
    """Hold what every command that loads models takes besides its own options."""


app = typer.Typer(
    name="pared",
    cls=LazyCommands,
    help="Make language models smaller and hand them back as ordinary Hugging Face checkpoints.",
    no_args_is_help=True,
    **LOOKS,
)


def _version(asked: bool) -> None:
    if asked:
        from pared.environment import __version__

        typer.echo(f"pared {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    _: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", help="Say more, such as which statistics were damped.")] = False,
) -> None:
    logging.basicConfig(format="note: %(message)s")
    logging.getLogger("pared").setLevel(logging.INFO if verbose else logging.WARNING)
    for what_is_named in ("pared.data", "pared.models"):
        logging.getLogger(what_is_named).setLevel(logging.INFO)
