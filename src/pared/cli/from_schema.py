"""The options of a command, made from the fields of what it asks for; see :mod:`pared.schema.command_line`."""

import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Generic, TypeVar, get_args, get_origin

import typer

from pared.errors import ParedError
from pared.io.guarded import parse_yaml
from pared.schema.base import Config, read_fields
from pared.schema.command_line import Declared, declared
from pared.schema.presets import FromPreset, left_below

Asked = TypeVar("Asked", bound=Config)
Function = TypeVar("Function", bound=Callable[..., Any])


@dataclass(frozen=True)
class Change:
    """What an option is in one command, where that is not what it is everywhere.

    Attributes:
        text: what it means.
        default: what holds without it, in words.
        value: what holds without it, in place of the field's default.
    """

    text: str | None = None
    default: str | None = None
    value: Any = None


@dataclass(frozen=True)
class Fields:
    """Which fields of a model a command takes as options; stands in the annotation of a parameter.

    Attributes:
        model: a recipe, a training or a search.
        only: dotted names of fields; a section's are all of it. Empty are all that have an option.
        file: the help of ``--recipe``, which names a file to begin with; None for a command that takes none.
        changed: by dotted name, what is not as everywhere.
    """

    model: type[Config]
    only: tuple[str, ...] = ()
    file: str | None = None
    changed: Mapping[str, Change] = field(default_factory=dict)

    def options(self) -> Iterator[tuple[Declared, Change]]:
        """Yield the fields that are options, and what is changed of them."""
        for one in declared(self.model):
            taken = not self.only or one.key in self.only or one.key.partition(".")[0] in self.only
            if one.option is not None and taken:
                yield one, self.changed.get(one.key, Change())


@dataclass(frozen=True)
class Given(Generic[Asked]):
    """What was given of a model on the command line.

    Attributes:
        model: it is of.
        values: by dotted name; None for what was not given.
        file: to begin with.
        flags: by dotted name, for messages.
    """

    model: type[Asked]
    values: Mapping[str, Any]
    file: Path | None = None
    flags: Mapping[str, str] = field(default_factory=dict)

    def merged(self, **more: Any) -> Asked:
        """Return what is asked for: a preset, below a file, below options.

        Args:
            more: other values, by name, over those given.

        Raises:
            ParedError: the file or an option is wrong.
        """
        values = {**self.values, **more}
        for key, value in values.items():
            if key in self.flags:
                values[key] = named_values(value, self.flags[key])
        return merge(self.model, self.file, values)


def schema_options(function: Function) -> Function:
    """Give a command the options that the annotations of its parameters name.

    A parameter ``given: Annotated[Given[Recipe], Fields(Recipe)]`` becomes an option for every field of the recipe; the
    function is called with what was given of them. All other parameters stay as they are.
    """
    own = list(inspect.signature(function).parameters.values())
    sections = {one.name: marker for one in own if (marker := _marker(one.annotation)) is not None}
    parameters: list[inspect.Parameter] = []
    keys: dict[str, dict[str, str]] = {}  # of every section, dotted key by the name of its parameter
    for one in own:
        if one.name not in sections:
            parameters.append(one)
            continue
        made = list(_parameters(sections[one.name]))
        parameters += [parameter for _, parameter in made]
        keys[one.name] = {parameter.name: key for key, parameter in made}

    def command(**given: Any) -> Any:
        for name, section in sections.items():
            values = {key: given.pop(parameter) for parameter, key in keys[name].items()}
            given[name] = _given(section, values)
        return function(**given)

    keyword = inspect.Parameter.KEYWORD_ONLY
    command.__name__, command.__doc__, command.__module__ = function.__name__, function.__doc__, function.__module__
    command.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [one.replace(kind=keyword) for one in parameters]
    )
    command.__annotations__ = {one.name: one.annotation for one in parameters}
    return command  # type: ignore[return-value]


FILE = "--recipe"  # the key of a file to begin with, which no field has


def _marker(annotation: Any) -> Fields | None:
    arguments = get_args(annotation) if get_origin(annotation) is Annotated else ()
    return next((one for one in arguments if isinstance(one, Fields)), None)


def _given(section: Fields, values: dict[str, Any]) -> Given[Any]:
    file = values.pop(FILE, None)
    flags = {one.key: one.flag for one, _ in section.options() if one.kind is dict}
    for one, change in section.options():
        values[one.key] = change.value if values[one.key] is None else values[one.key]
    return Given(section.model, values, file, flags)


def _parameters(section: Fields) -> Iterator[tuple[str, inspect.Parameter]]:
    """Yield the key of every option with the parameter that typer makes it of; a file's stands behind the arguments."""
    options = list(section.options())
    for one, change in (pair for pair in options if pair[0].option.argument):  # type: ignore[union-attr]
        yield one.key, _parameter(one.flag, one.kind, typer.Argument(help=_help(one, change), show_default=False))
    if section.file is not None:
        yield FILE, _parameter(FILE, Path, typer.Option(FILE, help=section.file, show_default=False))
    for one, change in (pair for pair in options if not pair[0].option.argument):  # type: ignore[union-attr]
        kind = list[str] if one.kind is dict else one.kind
        taken_back = kind is bool and section.file is not None  # what a file says
        flags = f"{one.flag}/--no-{one.flag.removeprefix('--')}" if taken_back else one.flag
        yield one.key, _parameter(one.flag, kind, typer.Option(flags, help=_help(one, change), show_default=False))


def _parameter(flag: str, kind: Any, info: Any) -> inspect.Parameter:
    name = flag.removeprefix("--").replace("-", "_")
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind | None, info]
    )


def _help(one: Declared, change: Change) -> str:
    default = one.default if change.value is None else str(change.value)
    default = default if change.default is None else change.default
    repeatable = " Repeatable." if one.kind in (dict, list[str]) else ""
    return f"{change.text or one.help}{repeatable}{f' [default: {default}]' if default else ''}"


def named_values(pairs: list[str] | None, option: str = "--option") -> dict[str, Any] | None:
    """Return ``NAME=VALUE`` pairs as a mapping: truth values, numbers and lists as YAML has them, all else as text.

    Args:
        pairs: as they were given.
        option: that they were given with, for messages.

    Raises:
        ParedError: a pair without an equals sign.
    """
    for pair in pairs or []:
        if "=" not in pair:
            raise ParedError(f"{option} {pair!r}: expected NAME=VALUE")
    return {name: _value(value) for name, _, value in (pair.partition("=") for pair in pairs or [])} or None


def _value(text: str) -> Any:
    """Return a value; a pattern such as ``*.q_proj``, which YAML takes for an alias, is text, and 1e-4 is a number."""
    try:
        found = parse_yaml(text, "option")
    except ParedError:
        return text
    if isinstance(found, str) and re.fullmatch(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+", found):
        return float(found)
    return found if isinstance(found, (bool, int, float, list)) else text


def merge(model: type[Asked], file: Path | None, given: Mapping[str, Any]) -> Asked:
    """Return what a file asks for with the options that were given laid over it, and both over their preset.

    Args:
        model: a recipe, a training or a search.
        file: that holds one, or none.
        given: options by dotted key (``calibration.samples``); None for those not given.

    Raises:
        ParedError: the file or an option is wrong.
    """
    what = model.NOUN
    fields: dict[str, Any] = {}
    if file:
        fields = read_fields(file, what)  # what it says itself, over which options are laid, and both over a preset
        model.of(fields, f"{what} {file}")  # a mistake in the file is reported for the file alone
    if given.get("evaluation.text") == "none":
        if any(given.get(f"evaluation.{key}") is not None for key in ("length", "windows")):
            raise ParedError("--eval none measures nothing; --eval-length and --eval-windows have no meaning with it")
        given = {key: value for key, value in given.items() if not key.startswith("evaluation.")}
        fields["evaluation"] = None
    above = {key: str(value) if isinstance(value, Path) else value
             for key, value in given.items() if value is not None and value != []}  # fmt: skip
    if issubclass(model, FromPreset):
        fields = left_below(fields, above, model.COMMAND)
    switches = {one.key: one.flag for one in declared(model) if one.section}
    for key, value in above.items():
        section, _, leaf = key.rpartition(".")
        if key in switches:
            fields[key] = _section(fields.get(key)) if value else None
            continue
        if section in switches and above.get(section) is False:
            off = switches[section].replace("--", "--no-", 1)
            raise ParedError(f"{off} and an option of {section} ({leaf} {value}) are given; leave one of them out")
        target = fields
        if section:
            target = fields[section] = _section(fields.get(section))
        target[leaf] = {**(target.get(leaf) or {}), **value} if isinstance(value, dict) else value
    return model.of(fields, f"{what} {file} with options" if file else "options")


def _section(found: Any) -> dict[str, Any]:
    """Return what a file says of a section; it may say true or null."""
    return dict(found) if isinstance(found, Mapping) else {}
