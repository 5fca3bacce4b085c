"""What users write, in files and in Python: strict models, whose first mistake is reported in one line."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, TypeVar, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, ValidationInfo
from typing_extensions import Self

from pared.errors import ParedError
from pared.io.guarded import read_yaml
from pared.memory import parse_size
from pared.names import did_you_mean, with_article
from pared.schema.command_line import with_attributes

# What pydantic calls the errors of something that is no mapping, or no list.
_NO_MAPPING = ("model_type", "model_attributes_type", "dict_type", "mapping_type")
_NO_LIST = ("tuple_type", "list_type")
# What it calls the kinds that the value of an option may have, behind the option's name.
_BRANCHES = ("bool", "int", "float", "str")


if TYPE_CHECKING:
    from pydantic._internal._model_construction import ModelMetaclass
else:
    ModelMetaclass = type(BaseModel)


class _InOneLine(ModelMetaclass):
    """Makes a model from Python as :func:`validated` makes it from a file: with one error of ours."""

    def __call__(self: Any, *args: Any, **fields: Any) -> Any:
        if args:
            raise ParedError(
                f"{self.__name__} takes named fields, such as {_example(self)}; got {_shown(args[0])}"
                + (f"; a mapping is read by {self.__name__}.of" if isinstance(args[0], Mapping) else "")
            )
        with _told(self, self.__name__):
            return super().__call__(**fields)


class Strict(BaseModel, metaclass=_InOneLine):
    """A model without unknown keys, never changed; what is wrong with one is reported by a :class:`ParedError`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @classmethod
    def model_validate(cls, obj: Any, **more: Any) -> Self:
        """Build one from plain data; :func:`validated` also says where they are from.

        Raises:
            ParedError: an unknown key or a value out of range.
        """
        with _told(cls, cls.__name__):
            return super().model_validate(obj, **more)

    @classmethod
    def model_validate_json(cls, json_data: str | bytes | bytearray, **more: Any) -> Self:
        """Build one from JSON.

        Raises:
            ParedError: not JSON, an unknown key or a value out of range.
        """
        with _told(cls, cls.__name__):
            return super().model_validate_json(json_data, **more)

    def __setattr__(self, name: str, value: Any) -> None:
        """Refuse to change it.

        Raises:
            ParedError: always; tells how to make another.
        """
        kind = type(self).__name__
        if name not in type(self).model_fields:
            raise ParedError(f"{kind} has no {name!r}; {did_you_mean(name, type(self).model_fields)}")
        raise ParedError(
            f"{with_article(kind)} is frozen and {name} stays {getattr(self, name)!r}; make another: "
            f"{kind.lower()}.model_copy(update={{{name!r}: {value!r}}})"
        )

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """Return a copy with other values, which are checked as everywhere.

        Raises:
            ParedError: an unknown key or a value out of range.
        """
        if not update:
            return super().model_copy(deep=deep)
        update = self.plain(update)
        given = {name: getattr(self, name) for name in self.model_fields_set}
        return validated(type(self), {**self.left_beside(given, update), **update}, type(self).__name__)

    @classmethod
    def plain(cls, fields: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return fields as a file has them: as they are, unless a subclass takes values of more kinds."""
        return fields

    def left_beside(self, given: Mapping[str, Any], update: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return what was given and stays where other values are laid over it: all, unless a subclass knows better."""
        del update
        return given


class _Described(_InOneLine):
    """Tells with the docstring of a model what its fields mean."""

    @property
    def __doc__(self) -> str | None:  # type: ignore[override]
        return with_attributes(self)


class Config(Strict, metaclass=_Described):
    """What users write: a model that is read from files, and whose fields are explained by the text under them."""

    model_config = ConfigDict(allow_inf_nan=False)

    NOUN: ClassVar[str] = "settings"  # what a file of it is called

    @classmethod
    def of(cls, fields: Any, origin: str | None = None) -> Self:
        """Build one from plain data.

        Args:
            fields: a mapping; one that is built already is returned as it is.
            origin: where the fields are from, for messages.

        Raises:
            ParedError: an unknown key (quoted, with the nearest valid one) or a value out of range.
        """
        return validated(cls, fields, origin or cls.NOUN)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read one from a YAML (or JSON) file.

        Raises:
            ParedError: the file is missing, not YAML, or something else.
        """
        return cls.of(read_fields(path, cls.NOUN), f"{cls.NOUN} {path}")


Asked = TypeVar("Asked", bound=Strict)


def _plain_int(value: object) -> object:
    return int(value) if isinstance(value, Integral) and not isinstance(value, bool) else value


def _plain_str(value: object) -> object:
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def _size(value: object, info: ValidationInfo) -> str:
    """Return a size as it was written, once it is known to be one."""
    try:
        parse_size(str(value), info.field_name or "size")
    except ParedError as error:
        raise ValueError(str(error)) from None
    return str(value)


# An integer of numpy's or torch's is one too, and a path is its name.
Whole = Annotated[int, Field(strict=True), BeforeValidator(_plain_int)]
Name = Annotated[str, BeforeValidator(_plain_str)]
Size = Annotated[str, BeforeValidator(_size)]  # bytes: 2GiB


def validated(model: type[Asked], fields: Any, origin: str) -> Asked:
    """Build a model from plain data.

    Raises:
        ParedError: no mapping, an unknown key (quoted, with the nearest valid one) or a value out of range.
    """
    if isinstance(fields, model):
        return fields
    if isinstance(fields, Mapping):
        fields = dict(fields)
    with _told(model, origin):
        return model.__pydantic_validator__.validate_python(fields)


def read_fields(path: str | Path, what: str) -> dict[str, Any]:
    """Read the mapping of a YAML (or JSON) file.

    Args:
        path: of the file.
        what: it is to be, for messages: ``recipe``.

    Raises:
        ParedError: the file is missing, not YAML, or no mapping.
    """
    try:
        fields = read_yaml(Path(path), what)
    except TypeError:
        raise ParedError(f"{what}: expected the path of a file, got {_shown(path)}") from None
    if not isinstance(fields, dict):
        raise ParedError(f"{what} {path}: expected a mapping of keys, got {type(fields).__name__}")
    return fields


@contextmanager
def _told(model: type[BaseModel], origin: str) -> Iterator[None]:
    """Turn what pydantic has to say into one error of ours."""
    try:
        yield
    except ValidationError as error:
        raise ParedError(f"{origin}: {_explain(model, error)}") from None


def _explain(model: type[BaseModel], error: ValidationError) -> str:
    """Tell pydantic's first complaint in one line, with the nearest valid key for an unknown one."""
    errors = error.errors(include_url=False)
    # A key that is missing may be one that is misspelt.
    first = next((one for one in errors if one["type"] != "missing"), errors[0])
    kind, found = first["type"], first["input"]
    place = tuple(part for part in first["loc"] if len(first["loc"]) == 1 or part not in _BRANCHES)
    where = ".".join(map(str, place))
    if kind == "missing":
        return f"expected a value of {where}, got none"
    if kind in ("too_short", "string_too_short") and found == "":
        return f"{where}: expected the name of a folder; got {_shown(found)}"
    if len(place) < len(first["loc"]):
        return f"{where}: expected a truth value, a finite number or a text; got {_shown(found)}"
    if kind == "extra_forbidden":
        section = _section(model, first["loc"][:-1])
        return f"unknown key {where!r}; {did_you_mean(str(first['loc'][-1]), section.model_fields)}"
    if kind == "value_error":  # ours: says what was found
        return str(first["ctx"]["error"])
    if kind in _NO_MAPPING:
        section = _section(model, first["loc"])
        keys = "" if section is model and first["loc"] else f" ({', '.join(section.model_fields)})"
        return f"{where + ': ' if where else ''}expected a mapping of its fields{keys}, got {_shown(found)}"
    if kind in _NO_LIST and isinstance(found, str):
        return f"{where}: expected a list of strings, such as [{found!r}]; got {found!r}"
    return f"{where}: {_in_words(first['msg'])}; got {_shown(found)}"


def _in_words(message: str) -> str:
    """Return what pydantic says was to be, as a part of a sentence of ours."""
    expected = message.removeprefix("Input should be ")
    if expected == message:
        return message
    return f"expected {'a number ' if expected.startswith(('greater', 'less')) else ''}{expected}"


def _section(model: type[BaseModel], path: tuple[int | str, ...]) -> type[BaseModel]:
    """Return the model that stands at a path of keys inside of a model, or the innermost on the way that is known."""
    for part in path:
        field = model.model_fields.get(str(part))
        model = model if field is None else next(_models_in(field.annotation), model)
    return model


def _models_in(annotation: Any) -> Any:
    """Yield the models that an annotation names, such as ``Evaluation | None``."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in get_args(annotation):
        yield from _models_in(inner)


def _shown(value: object) -> str:
    """Return what was found, short enough to read."""
    text = repr(value)
    return text if len(text) <= 120 else f"{type(value).__name__} {text[:100]}..."


def _example(model: type[BaseModel]) -> str:
    return (
        f"{model.__name__}({next((name for name in model.model_fields if name not in ('version', 'preset')), '')}=...)"
    )
