"""The side that runs the tests. A program's functions are asked from another process; what they return is plain data.

So a test compares the built-in values themselves: a class of the program's own, its ``==``, its builtins, its frames
and its exit handlers are elsewhere, and so are these tests for the program.
"""

import builtins
import traceback
from typing import Any

from .wire import Channel, decode, encode

ENDED, GONE = "ended before its last line", "the program ended while it was tested"


class RaisedError(Exception):
    """An exception of the program's that is no built-in one."""


class GoneError(BaseException):
    """The program ended before the tests did; no test catches it."""


class Remote:
    """An object of the program's: its functions, classes, and values that are no plain data.

    It can be called, iterated, looked into and handed back. It equals itself alone, is not ordered, and no number:
    these would be the program's own word for whether it is right.
    """

    def __init__(self, program: "Program", ref: int | str) -> None:
        object.__setattr__(self, "_program", program)
        object.__setattr__(self, "_ref", ref)

    def __call__(self, *given: Any, **named: Any) -> Any:
        """Call it in the program."""
        return self._program.ask("call", self, *given, **named)

    def __getattr__(self, name: str) -> Any:
        return self._program.ask("get", self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        self._program.ask("set", self, name, value)

    def __getitem__(self, key: Any) -> Any:
        return self._program.ask("item", self, key)

    def __setitem__(self, key: Any, value: Any) -> None:
        self._program.ask("put", self, key, value)

    def __contains__(self, key: Any) -> bool:
        return self._program.ask("has", self, key) is True

    def __iter__(self) -> Any:
        return self._program.ask("iterate", self)

    def __next__(self) -> Any:
        return self._program.ask("next", self)

    def __len__(self) -> int:
        return int(self._program.ask("length", self))

    def __str__(self) -> str:
        return str(self._program.ask("text", self))

    def __bool__(self) -> bool:
        return self._program.ask("true", self) is True


class Program:
    """The program, as its judge sees it."""

    def __init__(self, channel: Channel) -> None:
        self.channel = channel
        self.seen: dict[int | str, Remote] = {}

    def named(self, name: str) -> Remote:
        """Return what the program calls so."""
        return self.seen.setdefault(name, Remote(self, name))

    def wait(self) -> None:
        """Wait until the program ran to its last line."""
        if self._receive() != {"ready": True}:
            raise GoneError("the program said something else than that it ran")

    def ask(self, act: str, on: Remote, *given: Any, **named: Any) -> Any:
        """Return what comes of an act in the program; lists, dicts and sets that it changed are changed here too.

        Raises:
            Exception: what the program raised, or an answer that is none.
        """
        sent = [encode(one, _handle) for one in given]
        try:
            self.channel.send({
                "act": act, "on": _handle(on), "given": sent,
                "named": {name: encode(one, _handle) for name, one in named.items()},
            })  # fmt: skip
        except OSError as error:
            raise GoneError(GONE) from error
        reply = self._receive()
        if "raised" in reply:
            raise _raised(str(reply["raised"]), str(reply["text"]))
        for one, after in zip(given, reply.get("given", ()), strict=False):
            _change(one, decode(after, self._resolve))
        return decode(reply["value"], self._resolve)

    def _receive(self) -> Any:
        try:
            return self.channel.receive()
        except (EOFError, OSError) as error:
            raise GoneError(GONE) from error

    def _resolve(self, handle: dict[str, Any]) -> Remote:
        ref = handle["ref"]
        if not isinstance(ref, (int, str)):
            raise ValueError("a handle is a number or a name")
        return self.seen.setdefault(ref, Remote(self, ref))


def _handle(value: Any) -> dict[str, Any]:
    if not isinstance(value, Remote):
        raise TypeError(
            f"a test hands a {type(value).__name__} to the program; expected plain data, or what it returned"
        )
    return {"ref": object.__getattribute__(value, "_ref")}


def _raised(name: str, text: str) -> Exception:
    """Return the built-in exception of a name, or one that says that it is none."""
    kind = getattr(builtins, name, None)
    if isinstance(kind, type) and issubclass(kind, Exception) and not issubclass(kind, UnicodeError):
        return kind(text)
    return RaisedError(f"{name}: {text}")


def _change(one: Any, after: Any) -> None:
    if type(one) is not type(after):
        return
    if isinstance(one, list):
        one[:] = after
    elif isinstance(one, (dict, set)):
        one.clear()
        one.update(after)


def judged(given: str, tests: str, calls: list[str], channel: Channel) -> str:
    """Run the tests of a program.

    Args:
        given: trusted definitions that the tests use.
        tests: trusted.
        calls: names of the program's that the tests use, whatever ``given`` says.
        channel: to the program.

    Returns:
        How they failed, in words; nothing if they passed.
    """
    scope: dict[str, Any] = {"__name__": "tests"}
    program = Program(channel)
    try:
        program.wait()
    except GoneError:
        return ENDED
    try:
        exec(compile(given, "given", "exec"), scope)
        scope.update({name: program.named(name) for name in calls})
        exec(compile(tests, "tests", "exec"), scope)
    except BaseException as error:
        return _told(error, tests)
    return ""


def _told(error: BaseException, tests: str) -> str:
    """Return an error of the tests in words, with the line where it came up."""
    lines = tests.splitlines()
    numbers = [frame.lineno or 0 for frame in traceback.extract_tb(error.__traceback__) if frame.filename == "tests"]
    line = lines[numbers[-1] - 1].strip() if numbers and 0 < numbers[-1] <= len(lines) else ""
    kind = "" if isinstance(error, GoneError) else f"{type(error).__name__}: "
    return f"{kind}{error}"[:300].rstrip(": ") + (f" ({line[:200]})" if line else "")
