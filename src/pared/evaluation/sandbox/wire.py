"""Values between a program and its judge, as JSON: what arrives is plain data, and a handle for everything else.

Standard library only, as all that a supervisor runs.
"""

import json
import os
from collections.abc import Callable
from typing import Any

MOST = 32 << 20  # bytes of a message
EXACT = 1 << 53  # integers up to here are plain JSON, larger ones are written in hexadecimal


class Channel:
    """Messages over a descriptor that is read and written; each is its length in four bytes, then JSON."""

    def __init__(self, reads: int, writes: int) -> None:
        self.reads, self.writes = reads, writes

    def send(self, message: Any) -> None:
        """Send a message.

        Raises:
            ValueError: it is longer than ``MOST``.
            OSError: nobody reads any more.
        """
        text = framed(message)
        while text:
            text = text[os.write(self.writes, text) :]

    def receive(self) -> Any:
        """Return the next message.

        Raises:
            EOFError: the other side is gone.
            ValueError: it is too long, or no JSON.
        """
        size = int.from_bytes(self._exactly(4), "big")
        if size > MOST:
            raise ValueError(f"a message of {size:,} bytes; expected at most {MOST:,}")
        return json.loads(self._exactly(size))

    def _exactly(self, count: int) -> bytes:
        found = bytearray()
        while len(found) < count:
            piece = os.read(self.reads, min(count - len(found), 1 << 20))
            if not piece:
                raise EOFError("the other side is gone")
            found += piece
        return bytes(found)


def framed(message: Any) -> bytes:
    """Return a message as it is sent.

    Raises:
        ValueError: it is longer than ``MOST``.
    """
    text = json.dumps(message).encode()
    if len(text) > MOST:
        raise ValueError(f"a message of {len(text):,} bytes; expected at most {MOST:,}")
    return len(text).to_bytes(4, "big") + text


def encode(value: Any, refer: Callable[[Any], Any]) -> Any:
    """Return a value as JSON has it: numbers, text, bytes and containers by what they hold, whatever their own class.

    Args:
        value: to be sent.
        refer: gives what is sent for a value that is none of these.
    """
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int):
        return int(value) if -EXACT < value < EXACT else {"int": f"{value:x}"}
    if isinstance(value, (float, str)):
        return float(value) if isinstance(value, float) else str.__str__(value)
    if isinstance(value, (bytes, bytearray)):
        return {"bytes": bytes(value).hex()}
    if isinstance(value, complex):
        return {"complex": [value.real, value.imag]}
    if isinstance(value, list):
        return [encode(one, refer) for one in list.__iter__(value)]
    if isinstance(value, dict):
        return {"dict": [[encode(key, refer), encode(one, refer)] for key, one in dict.items(value)]}
    for kind in (tuple, set, frozenset):
        if isinstance(value, kind):
            return {kind.__name__: [encode(one, refer) for one in value]}
    return _number(value) or _of_numpy(value, refer) or refer(value)


def _number(value: Any) -> Any:
    """Return an exact number of the standard library, None for anything else."""
    kind = type(value)
    if kind.__module__ == "fractions" and kind.__name__ == "Fraction":
        return {"Fraction": [f"{value.numerator:x}", f"{value.denominator:x}"]}
    if kind.__module__ in ("decimal", "_decimal") and kind.__name__ == "Decimal":
        return {"Decimal": str(value)}
    return None


def _of_numpy(value: Any, refer: Callable[[Any], Any]) -> Any:
    """Return a scalar of numpy as the number it holds, None for anything else; it is neither None nor 0 itself."""
    if type(value).__module__ == "numpy" and getattr(value, "shape", None) == ():
        plain = value.item()
        if type(plain) is not type(value):
            return {"plain": encode(plain, refer)}
    return None


def decode(value: Any, resolve: Callable[[Any], Any]) -> Any:
    """Return what was encoded; of each kind the built-in class itself.

    Args:
        value: as it arrived.
        resolve: gives the object that a handle (a dict with ``ref``) stands for.

    Raises:
        ValueError, TypeError: it is nothing that ``encode`` makes.
    """
    if isinstance(value, list):
        return [decode(one, resolve) for one in value]
    if not isinstance(value, dict):
        return value
    if "ref" in value:
        return resolve(value)
    ((kind, held),) = value.items()
    if kind == "dict":
        return {decode(key, resolve): decode(one, resolve) for key, one in held}
    if kind == "plain":
        return decode(held, resolve)
    if kind in _CONTAINERS:
        return _CONTAINERS[kind](decode(one, resolve) for one in held)
    return _SCALARS[kind](held)


def _fraction(held: Any) -> Any:
    from fractions import Fraction

    return Fraction(int(held[0], 16), int(held[1], 16))


def _decimal(held: Any) -> Any:
    from decimal import Decimal

    return Decimal(held)


_CONTAINERS: dict[str, Callable[..., Any]] = {"tuple": tuple, "set": set, "frozenset": frozenset}
_SCALARS: dict[str, Callable[[Any], Any]] = {
    "int": lambda held: int(held, 16),
    "bytes": bytes.fromhex,
    "complex": lambda held: complex(*held),
    "Fraction": _fraction,
    "Decimal": _decimal,
}
