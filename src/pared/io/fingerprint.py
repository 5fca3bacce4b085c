"""What a run depends on, as a dictionary of JSON, and how two of them differ, key by key."""

import json
import re
from collections.abc import Mapping
from typing import Any

from pared.errors import ParedError
from pared.io.guarded import brief

DIGEST = re.compile(r"[0-9a-f]{32,}")
SHOWN, LISTED = 12, 8  # characters of a digest, and differences, that a message shows


def as_json(fingerprint: Mapping[str, Any]) -> dict[str, Any]:
    """Return a fingerprint as it comes back from a file: tuples are lists, all keys text."""
    found: dict[str, Any] = json.loads(json.dumps(fingerprint))
    return found


def differences(there: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return what differs between two fingerprints, a line each: ``calibration.samples: 64 there, 128 now``.

    Args:
        there: of a run that left its state, as a file holds it.
        now: of the run that would take it up, in whatever order.
    """
    first, second = _flat(there), _flat(as_json(now))
    keys = [*second, *(key for key in first if key not in second)]
    return [
        f"{key}: {_shown(first, key)} there, {_shown(second, key)} now"
        for key in keys
        if key not in first or key not in second or first[key] != second[key]
    ]


def require_same(there: Mapping[str, Any], now: Mapping[str, Any], what: str, advice: str) -> None:
    """Refuse the state of another run.

    Args:
        there: fingerprint of the run that left it.
        now: of this one.
        what: the state, for the message, which continues with what differs.
        advice: what to do.

    Raises:
        ParedError: they differ; spells out where.
    """
    found = differences(there, now)
    if found:
        more = [] if len(found) <= LISTED else [f"and {len(found) - LISTED} more"]
        raise ParedError(f"{what} ({', '.join([*found[:LISTED], *more])}); {advice}")


def _flat(value: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """Return the leaves of nested dictionaries by dotted paths; a list is a leaf, and so is an empty dictionary."""
    found: dict[str, Any] = {}
    for key, inner in value.items():
        if isinstance(inner, Mapping) and inner:
            found |= _flat(inner, f"{above}{key}.")
        else:
            found[f"{above}{key}"] = inner
    return found


def _shown(flat: Mapping[str, Any], key: str) -> str:
    if key not in flat:
        return "nothing"
    return DIGEST.sub(lambda digest: f"{digest[0][:SHOWN]}…", brief(flat[key], 100))
