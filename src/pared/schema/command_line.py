"""How the fields of a recipe, a training and a search are given on the command line, declared beside the field.

    keep: Annotated[float, Field(gt=0, le=1), Option()] = 0.8
    "Fraction of the parameters that stays: 0.8 removes 20%."

is all there is to ``--keep``, to the key of the file, to the attribute in Python and to its row in ``docs/options.md``.
A field without an :class:`Option` is one of files and of Python alone. The text under a field is read from the source
when somebody asks for help: pydantic, which can do that for every class as it is made, takes 20 ms of every start.
"""

import ast
import inspect
import sys
import types
from collections.abc import Iterator
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

OWN = "the method's own"  # what a default is that the method decides


@dataclass(frozen=True)
class Option:
    """The option of a field.

    Attributes:
        flag: such as ``--data``; empty is the field's own name.
        default: what happens without it, in words, where the value of the field does not say so.
        argument: whether it is given by position rather than by name.
        path: whether it is a file or a folder.
    """

    flag: str = ""
    default: str | None = None
    argument: bool = False
    path: bool = False

    def __repr__(self) -> str:
        """Return what was said, as signatures show it."""
        said = [
            f"{field.name}={value!r}" for field in fields(self) if (value := getattr(self, field.name)) != field.default
        ]
        return f"Option({', '.join(said)})"


@dataclass(frozen=True)
class Declared:
    """A field, wherever it stands in a model.

    Attributes:
        key: its dotted name: ``calibration.samples``.
        text: what it means.
        field: what pydantic knows of it.
        option: its option; None for one that the command line does not have.
        section: whether it is a section that may be there or not: the option turns it on with its defaults.
    """

    key: str
    text: str
    field: FieldInfo
    option: Option | None
    section: bool = False

    @property
    def flag(self) -> str:
        """The name of the option, or of the argument."""
        option = self.option or Option()
        name = self.key.rpartition(".")[2]
        return name if option.argument else option.flag or f"--{name.replace('_', '-')}"

    @property
    def help(self) -> str:
        """What it means, and what it may be where that is a choice."""
        text, choices = self.text, self.choices
        if self.option is not None and self.option.default is not None:
            choices = tuple(one for one in choices if one != "auto")  # what the default stands for
        return text if len(choices) < 2 else f"{text} One of {', '.join(choices)}."

    @property
    def default(self) -> str:
        """What holds without it, in words; empty if that is nothing."""
        option, value = self.option or Option(), self.field.default
        if option.default is not None:
            return option.default
        if isinstance(value, float):
            return f"{value:g}"
        if isinstance(value, (tuple, list)):
            return ", ".join(map(str, value))
        return "" if value is None or isinstance(value, (bool, dict)) else str(value)

    @property
    def choices(self) -> tuple[str, ...]:
        """The values there are; empty if there are any."""
        kinds = list(_plain(self.field.annotation))
        return tuple(str(one) for kind in kinds for one in get_args(kind)) if _all_literal(kinds) else ()

    @property
    def kind(self) -> Any:
        """The type that the command line reads, which pydantic checks afterwards; ``dict`` for ``NAME=VALUE`` pairs."""
        kinds = list(_plain(self.field.annotation))
        if self.section:
            return bool
        if any(get_origin(kind) is dict for kind in kinds):
            return dict
        if any(get_origin(kind) is tuple for kind in kinds):
            return list[str]
        if self.option is not None and self.option.path:
            return Path
        return kinds[0] if len(kinds) == 1 and kinds[0] in (bool, int, float) else str


def declared(model: type[BaseModel], above: str = "") -> Iterator[Declared]:
    """Yield the fields of a model and of those inside of it, in the order in which they are declared."""
    for name, field in model.model_fields.items():
        inner = [kind for kind in _plain(field.annotation) if isinstance(kind, type) and issubclass(kind, BaseModel)]
        option = next((one for one in field.metadata if isinstance(one, Option)), None)
        if option is not None or not inner:
            yield Declared(f"{above}{name}", text_of(model, name), field, option, section=bool(inner))
        if inner:
            yield from declared(inner[0], f"{above}{name}.")


def as_words(config: BaseModel) -> list[str]:
    """Return a model as the words of a command line that ask for it: arguments, then options that are not defaults."""
    arguments: list[str] = []
    options: list[str] = []
    for one in declared(type(config)):
        owner: Any = config
        *sections, name = one.key.split(".")
        for section in sections:
            owner = None if owner is None else getattr(owner, section)
        value = None if owner is None else getattr(owner, name)
        if one.option is None or value is None or (not one.section and value == one.field.default):
            continue
        if one.option.argument:
            arguments.append(str(value))
        elif one.section or isinstance(value, bool):
            options += [one.flag] if value is not False else []
        elif isinstance(value, dict):
            options += [word for key, own in value.items() for word in (one.flag, f"{key}={own}")]
        else:
            several = value if isinstance(value, tuple) else (value,)
            options += [
                word for own in several for word in (one.flag, f"{own:.6g}" if isinstance(own, float) else str(own))
            ]
    if getattr(config, "evaluation", ...) is None:
        options += ["--eval", "none"]
    return arguments + options


def text_of(model: type[BaseModel], name: str) -> str:
    """Return the text under a field, on one line; empty where the source is not available."""
    texts = (_texts(owner.__module__).get(owner.__name__, {}).get(name) for owner in model.__mro__)
    return next((text for text in texts if text), "")


def with_attributes(model: type[Any]) -> str | None:
    """Return the docstring of a model with what its fields mean, as Google's style has it."""
    doc = model.__dict__.get("__doc__")
    lines = [f"    {name}: {text}" for name in getattr(model, "model_fields", {}) if (text := text_of(model, name))]
    return "\n".join([inspect.cleandoc(doc), "", "Attributes:", *lines, ""]) if doc and lines else doc


@cache
def _texts(module: str) -> dict[str, dict[str, str]]:
    """Return of every class of a module the texts that stand under its fields, each on one line."""
    try:
        tree = ast.parse(inspect.getsource(sys.modules[module]))
    except (OSError, TypeError, KeyError):  # typed in, or installed without source
        return {}
    found: dict[str, dict[str, str]] = {}
    for node in tree.body:
        if isinstance(node, ast.ClassDef):
            texts = found.setdefault(node.name, {})
            for field, below in zip(node.body, node.body[1:], strict=False):
                if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
                    text = below.value if isinstance(below, ast.Expr) else None
                    if isinstance(text, ast.Constant) and isinstance(text.value, str):
                        texts[field.target.id] = " ".join(text.value.split())
    return found


def _plain(annotation: Any) -> Iterator[Any]:
    """Yield the types of an annotation without their metadata for pydantic, and without None."""
    if get_origin(annotation) is Annotated:
        yield from _plain(get_args(annotation)[0])
    elif get_origin(annotation) in (Union, types.UnionType):
        for one in get_args(annotation):
            yield from _plain(one)
    elif annotation is not type(None):
        yield annotation


def _all_literal(kinds: list[Any]) -> bool:
    return bool(kinds) and all(get_origin(kind) is Literal for kind in kinds)
