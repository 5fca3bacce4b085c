"""What users write in files: strict models, whose first mistake is told in one line."""

from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from pared.errors import ParedError
from pared.names import did_you_mean


class Strict(BaseModel):
    """A model without unknown keys, never changed."""

    model_config = ConfigDict(extra="forbid", frozen=True)


Asked = TypeVar("Asked", bound=Strict)


def validated(model: type[Asked], fields: dict[str, Any], origin: str) -> Asked:
    """Build a model from plain data.

    Raises:
        ParedError: an unknown key (quoted, with the nearest valid one) or a value out of range.
    """
    try:
        return model.model_validate(fields)
    except ValidationError as error:
        raise ParedError(f"{origin}: {_explain(model, error)}") from None


def read_fields(path: str | Path, what: str) -> dict[str, Any]:
    """Read the mapping of a YAML (or JSON) file.

    Args:
        path: of the file.
        what: it is to be, for messages: ``recipe``.

    Raises:
        ParedError: the file is missing, not YAML, or no mapping.
    """
    try:
        fields = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ParedError(f"{what} {path}: {error.strerror or error}") from None
    except (yaml.YAMLError, ValueError) as error:  # not UTF-8, or a date or number that cannot be
        raise ParedError(f"{what} {path}: not readable as YAML: {' '.join(str(error).split())}") from None
    if not isinstance(fields, dict):
        raise ParedError(f"{what} {path}: expected a mapping of keys, found {type(fields).__name__}")
    return fields


def _explain(model: type[BaseModel], error: ValidationError) -> str:
    """Tell pydantic's first complaint in one line, with the nearest valid key for an unknown one."""
    first = error.errors(include_url=False)[0]
    where = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        section = model if len(first["loc"]) == 1 else _section(model, str(first["loc"][0]))
        return f"unknown key {where!r}; {did_you_mean(str(first['loc'][-1]), section.model_fields)}"
    if first["type"] == "value_error":  # ours: says what was found
        return str(first["ctx"]["error"])
    return f"{where}: {first['msg']}; found {first['input']!r}"


def _section(model: type[BaseModel], name: str) -> type[BaseModel]:
    """Return the model inside of a model that a key holds."""
    annotation = model.model_fields[name].annotation
    candidates = (annotation, *get_args(annotation))
    return next(one for one in candidates if isinstance(one, type) and issubclass(one, BaseModel))
