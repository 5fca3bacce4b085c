"""Nested fields of what users write, by dotted name: ``calibration.samples``."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pydantic import BaseModel


def flatten(fields: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the values of nested mappings by dotted name."""
    for name, value in fields.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{above}{name}.")
        else:
            yield f"{above}{name}", value


def lies_inside(name: str, wanted: Sequence[str]) -> bool:
    """Whether a dotted name is one of those wanted, or a field of one."""
    return any(name == one or name.startswith(f"{one}.") for one in wanted)


def side_by_side(plain: Mapping[str, Any], asked: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Yield of two nested mappings both values by dotted name; null for what one does not have."""
    for name in {**plain, **asked}:
        one, other = plain.get(name), asked.get(name)
        if isinstance(one, Mapping) and isinstance(other, Mapping):
            yield from side_by_side(one, other, f"{above}{name}.")
        else:
            yield f"{above}{name}", one, other


def without_plain_nulls(fields: Mapping[str, Any], default: object, below: object) -> dict[str, Any]:
    """Return fields without the nulls that are there, too, if nothing is said of them.

    Args:
        fields: nested, as plain data.
        default: what they are by default.
        below: what they are laid over.
    """
    found: dict[str, Any] = {}
    for name, value in fields.items():
        usual, under = (one.get(name) if isinstance(one, Mapping) else None for one in (default, below))
        if isinstance(value, Mapping):
            found[name] = without_plain_nulls(value, usual, under)
        elif value is not None or usual is not None or under is not None:
            found[name] = value
    return found


def value_at(fields: Mapping[str, Any], dotted: str) -> Any:
    """Return what a dotted name stands for in fields whose sections may be models; None for what is not given."""
    section, _, leaf = dotted.rpartition(".")
    inside = plain(fields.get(section)) if section else fields
    return inside.get(leaf) if isinstance(inside, Mapping) else None


def only(asked: Mapping[str, Any], dotted: Mapping[str, str]) -> dict[str, Any]:
    """Return the values of dotted names alone, nested as they were."""
    found: dict[str, Any] = {}
    for name in dotted:
        value: Any = asked
        target = found
        *sections, leaf = name.split(".")
        for section in sections:
            value, target = value[section], target.setdefault(section, {})
        target[leaf] = value[leaf]
    return found


def plain(value: Any) -> Any:
    """Return a section that is a model as the mapping of what was given of it, anything else as it is."""
    return value.model_dump(exclude_unset=True) if isinstance(value, BaseModel) else value
