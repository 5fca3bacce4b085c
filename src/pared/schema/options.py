"""Options of methods and allocations: what was given, over the defaults."""

from collections.abc import Mapping

from pared.errors import ParedError
from pared.names import did_you_mean


def checked_options(given: Mapping[str, object], defaults: Mapping[str, object], owner: str) -> dict[str, object]:
    """Return the defaults with what was given over them.

    Raises:
        ParedError: an option the owner does not have, or a value of another type.
    """
    for name, value in given.items():
        if name not in defaults:
            valid = did_you_mean(name, defaults) if defaults else "it has none"
            raise ParedError(f"{owner} has no option {name!r}; {valid}")
        default = defaults[name]
        if type(value) is not type(default) and not (isinstance(default, float) and type(value) is int):
            raise ParedError(f"option {name} of {owner}: expected a {type(default).__name__}, found {value!r}")
    return {**defaults, **given}
