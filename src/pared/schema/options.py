"""Typed options of methods and allocators: what a recipe gives of them, over the defaults."""

from collections.abc import Mapping
from importlib import import_module
from typing import Any, ClassVar, Generic, Literal, TypeVar, get_args

from pydantic import ConfigDict, ValidationError

from pared.errors import ParedError
from pared.names import did_you_mean
from pared.schema.base import Strict

Kind = Literal["method", "allocation", "training method"]  # of what has options
# Where those that pared has are declared, which says what a type of options belongs to; imported when that is asked.
DECLARED: Mapping[Kind, str] = {
    "method": "pared.methods",
    "allocation": "pared.allocation.registry",
    "training method": "pared.training.registry",
}
# pydantic's kinds of errors that are of a value of another type
_TYPES = ("bool_type", "int_type", "float_type", "string_type", "int_from_float")


class Options(Strict):
    """The options of one method or allocator: a field each, with its default, its limits and a description.

    A subclass belongs to one method or allocator, which its type selects. Every field has a default. A recipe holds
    plain values by the names of the fields; a value of another type is refused, not converted (a whole number is a
    number). ``Field(description=...)`` says what is expected, in messages and in ``pared methods``. Classes are built
    when they are first used, so that declaring them costs nothing.
    """

    model_config = ConfigDict(strict=True, defer_build=True, allow_inf_nan=False)

    _owner: ClassVar[tuple[Kind, str]]

    @classmethod
    def owner(cls, kind: Kind) -> str:
        """Return the name of the method or allocator that the type selects.

        Args:
            kind: of what is to be selected.

        Raises:
            ValueError: none has declared it, or something of another kind; says so.
        """
        if "_owner" not in cls.__dict__:
            import_module(DECLARED[kind])
        of, name = cls.__dict__.get("_owner", ("", ""))
        if of != kind:
            found = f"; they are those of {of} {name}" if of else ""
            raise ValueError(f"{cls.__name__} holds the options of no {kind}{found}")
        return str(name)

    @classmethod
    def defaults(cls) -> dict[str, Any]:
        """Return the default of every option, by name."""
        return {name: field.default for name, field in cls.model_fields.items()}


def untyped(fields: Mapping[str, Any], places: Mapping[str, tuple[Kind, str]]) -> dict[str, Any]:
    """Return fields with names and plain values in place of typed options, whose type selects whose they are.

    Args:
        fields: of a recipe or a training: ``{"method": Wanda(variant=True)}``.
        places: by the field of a name the kind of what it names, and the field of its options.

    Raises:
        ValueError: options of something else, or given twice.
    """
    plain = dict(fields)
    for name, (kind, options) in places.items():
        if isinstance(given := fields.get(name), Options):
            owner = given.owner(kind)
            if fields.get(options):
                raise ValueError(f"{name} {type(given).__name__} brings its options; leave out {options}")
            plain |= {name: owner, options: given.model_dump(exclude_unset=True)}
    return plain


O = TypeVar("O", bound=Options)  # noqa: E741


class NoOptions(Options):
    """For what has no options."""


def belong_to(config: object, kind: Kind, name: str) -> None:
    """Say which method or allocator a type of options selects.

    Args:
        config: the type, which belongs to one alone.
        kind: of what declares it.
        name: of what declares it.

    Raises:
        ParedError: it is no type of options, has an option without a default, or belongs to another.
    """
    who = f"{kind} {name!r}"
    if not (isinstance(config, type) and issubclass(config, Options)):
        raise ParedError(f"{who}: expected a subclass of {Options.__module__}.{Options.__name__} as config, "
                         f"got {config!r}")  # fmt: skip
    for option, field in config.model_fields.items():
        if field.is_required():
            raise ParedError(f"{who}: its option {option} has no default; give {config.__name__}.{option} one")
    of, owner = config.__dict__.get("_owner", (kind, name))
    if (of, owner) != (kind, name):  # the type selects what it belongs to
        raise ParedError(f"{who}: its options are those of {of} {owner}; give it a type of its own, a subclass of them")
    config._owner = (kind, name)


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


class Configured(Generic[O]):
    """What has options: a base of the dataclasses that declare methods and allocators.

    Attributes:
        kind: what it is.
        name: what users call it.
        config: its options; the type belongs to it alone.
    """

    kind: ClassVar[Kind]
    name: str
    config: type[O]

    def __post_init__(self) -> None:
        belong_to(self.config, self.kind, self.name)

    def configured(self, options: Mapping[str, object] | Options | None = None) -> O:
        """Return options, with the default of each that is not given.

        Raises:
            ParedError: an option it does not have, or a value that it does not take.
        """
        if isinstance(options, self.config):
            return options
        assert not isinstance(options, Options), f"options of another {self.kind} than {self.name}"
        return read_options(self.config, options or {}, f"{self.kind} {self.name}")


def _explain(config: type[Options], error: ValidationError) -> str:
    """Tell pydantic's first complaint in a line."""
    first = error.errors(include_url=False)[0]
    name, found = str(first["loc"][0]) if first["loc"] else "", first["input"]
    if first["type"] == "value_error":  # of a validator of the options' own: says what was found
        return f"option {name}: {first['ctx']['error']}" if name else str(first["ctx"]["error"])
    if not name:
        return f"{first['msg']}; got {found!r}"
    field = config.model_fields[name]
    if first["type"] in _TYPES and len(first["loc"]) == 1:  # not one type of several
        expected = type(field.default).__name__
    elif first["type"] == "finite_number":
        expected = "a finite number"
    elif first["type"] == "literal_error":
        expected = f"one of {', '.join(map(str, get_args(field.annotation)))}"
    else:
        expected = field.description or first["msg"]
    return f"option {name}: expected {expected}, got {found!r}"
