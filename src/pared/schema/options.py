"""Typed options of methods and allocators: what a recipe gives of them, over the defaults."""

from collections.abc import Mapping
from typing import Any, ClassVar, TypeVar, get_args

from pydantic import ConfigDict, ValidationError

from pared.errors import ParedError
from pared.names import did_you_mean
from pared.schema.base import Strict

# pydantic's kinds of errors that are of a value of another type
_TYPES = ("bool_type", "int_type", "float_type", "string_type", "int_from_float")


class Options(Strict):
    """The options of one method or allocator: a field each, with its default, its limits and a description.

    A subclass belongs to one method or allocator, which its type selects. Every field has a default. A recipe holds
    plain values by the names of the fields; a value of another type is refused, not converted (a whole number is a
    number). ``Field(description=...)`` says what is expected, in messages and in ``pared methods``. Classes are built
    when they are first used, so that declaring them costs nothing.
    """

    model_config = ConfigDict(strict=True, defer_build=True)

    _owner: ClassVar[str]

    @classmethod
    def belong_to(cls, name: str) -> None:
        """Say which method or allocator a type of options selects: the first that declares it."""
        if "_owner" not in cls.__dict__:
            cls._owner = name

    @classmethod
    def owner(cls) -> str:
        """Return the name of the method or allocator that the type selects; empty if none has declared it."""
        return str(cls.__dict__.get("_owner", ""))

    @classmethod
    def defaults(cls) -> dict[str, Any]:
        """Return the default of every option, by name."""
        return {name: field.default for name, field in cls.model_fields.items()}


O = TypeVar("O", bound=Options)  # noqa: E741


class NoOptions(Options):
    """For what has no options."""


def read_options(config: type[O], given: Mapping[str, object], owner: str) -> O:
    """Return the options of a method or an allocator: what is given, and the defaults of the others.

    Args:
        config: of the method or allocator.
        given: values by name, as a recipe holds them.
        owner: whose options they are, to print: ``method svd-llm``.

    Raises:
        ParedError: an option the owner does not have, or a value of another type or out of its limits.
    """
    for name in given:
        if name not in config.model_fields:
            valid = did_you_mean(name, config.model_fields) if config.model_fields else "it has none"
            raise ParedError(f"{owner} has no option {name!r}; {valid}")
    try:
        return config.__pydantic_validator__.validate_python(dict(given))
    except ValidationError as error:
        raise ParedError(f"{owner}: {_explain(config, error)}") from None


def _explain(config: type[Options], error: ValidationError) -> str:
    """Tell pydantic's first complaint in a line."""
    first = error.errors(include_url=False)[0]
    name, found = str(first["loc"][0]) if first["loc"] else "", first["input"]
    if first["type"] == "value_error":  # of a validator of the options' own: says what was found
        return f"option {name}: {first['ctx']['error']}" if name else str(first["ctx"]["error"])
    if not name:
        return f"{first['msg']}; got {found!r}"
    field = config.model_fields[name]
    if first["type"] in _TYPES:
        expected = type(field.default).__name__
    elif first["type"] == "literal_error":
        expected = f"one of {', '.join(map(str, get_args(field.annotation)))}"
    else:
        expected = field.description or first["msg"]
    return f"option {name}: expected {expected}, got {found!r}"
