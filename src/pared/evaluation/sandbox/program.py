"""The side that runs what a model wrote: the program once, then calls of its functions that the judge asks for.

Nothing here is trusted: the program can change all of it. It sees arguments, never the tests or what they expect.
"""

import operator
import os
import sys
import traceback
import types
from collections.abc import Callable
from typing import Any

from .wire import Channel, decode, encode

PATH = "program.py"
ACTS: dict[str, Callable[..., Any]] = {
    "call": lambda on, *given, **named: on(*given, **named),
    "get": getattr,
    "set": setattr,
    "item": operator.getitem,
    "put": operator.setitem,
    "has": operator.contains,
    "iterate": iter,
    "next": next,
    "length": len,
    "text": str,
    "true": bool,
}


def run(source: str, channel: Channel) -> None:
    """Run a program as ``__main__``, then do what the judge asks until it is gone; does not return."""
    with open(PATH, "w", encoding="utf-8", errors="surrogatepass") as file:
        file.write(source)  # for inspect and tracebacks; it ends with the folder
    module = types.ModuleType("__main__")
    module.__file__ = PATH
    sys.modules["__main__"] = module
    sys.argv = [PATH]
    try:
        exec(compile(source, PATH, "exec"), module.__dict__)
        flush()
        channel.send({"ready": True})
        answer(module.__dict__, channel)
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    except BaseException:
        traceback.print_exc()
        status = 1
    flush()
    os._exit(status & 0xFF)


def flush() -> None:
    """Write out what was printed."""
    try:
        print(end="", flush=True)
    except (OSError, ValueError, RuntimeError):  # the program closed or replaced it
        return


def answer(scope: dict[str, Any], channel: Channel) -> None:
    """Do what the judge asks for, one act after another."""
    held: list[Any] = []
    places: dict[int, int] = {}  # by identity: what is held is not freed

    def refer(value: Any) -> dict[str, Any]:
        place = places.setdefault(id(value), len(held))
        if place == len(held):
            held.append(value)
        return {"ref": place}

    def resolve(handle: dict[str, Any]) -> Any:
        ref = handle["ref"]
        return held[ref] if isinstance(ref, int) else scope[ref]

    while True:
        try:
            asked = channel.receive()
        except EOFError:
            return
        before = [asked["given"], asked["named"]]
        try:
            given = decode(before[0], resolve)
            named = {name: decode(one, resolve) for name, one in before[1].items()}
            value = ACTS[asked["act"]](resolve(asked["on"]), *given, **named)
            reply = {"value": encode(value, refer)}
            after = [encode(one, refer) for one in given]
            if after != before[0]:
                reply["given"] = after
        except Exception as error:
            reply = {"raised": type(error).__name__, "text": str(error)[:300]}
        flush()
        channel.send(reply)
