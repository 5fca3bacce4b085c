"""Whether two answers are equal as mathematics, by math-verify (Hugging Face), in a process apart.

What a model wrote is given to a parser and to a computer algebra system, which may take all the time and memory there
are, for ``9^{9^{9^9}}`` say: the process has little of both, and is ended and started anew where it does not answer.
"""

import contextlib
import importlib.util
import json
import os
import select
import subprocess
import sys
from collections.abc import Mapping
from types import TracebackType
from typing import Any

from typing_extensions import Self

PACKAGE, METRIC = "math_verify", "math_verify"
SECONDS = 5  # of parsing one text, and of comparing two; the library's own
PATIENCE = 60.0  # seconds until a process that does not answer is ended
MEMORY = 2 << 30  # bytes of its address space


def is_installed() -> bool:
    """Whether the package is there, which the extra ``eval`` brings."""
    return importlib.util.find_spec(PACKAGE) is not None


class Verifier:
    """Compares answers for the length of a ``with`` block."""

    def __init__(self, patience: float = PATIENCE) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._patience = patience

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()

    def same(self, right: str, answer: str) -> bool:
        r"""Whether what a text says is equal to what is right.

        Args:
            right: the answer on record, as LaTeX in ``\boxed{...}`` or as a number.
            answer: all that was written; what is boxed in it counts, or the last formula, or the last number.

        Returns:
            False too where no answer is found, or time or memory do not suffice to tell.
        """
        found = self._asked({"right": right, "answer": answer})
        return found is not None and bool(found["same"])

    def _asked(self, message: Mapping[str, str]) -> dict[str, Any] | None:
        """Send two texts, and return what the process says of them; None where it says nothing and is ended."""
        if self._process is None:
            command = [sys.executable, "-m", "pared.evaluation.symbolic"]
            pipe, nowhere = subprocess.PIPE, subprocess.DEVNULL
            self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=nowhere, bufsize=0)
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(OSError):  # it is gone: nothing is read then
            self._process.stdin.write(json.dumps(message).encode() + b"\n")
        ready, _, _ = select.select([self._process.stdout], [], [], self._patience)
        line = self._process.stdout.readline() if ready else b""
        if not line.endswith(b"\n"):  # nothing, or it ended while it wrote
            self._end()
            return None
        found: dict[str, Any] = json.loads(line)
        return found

    def _end(self) -> None:
        if self._process is None:
            return
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()
        self._process = None


def serve() -> None:
    """Compare two texts a line, as long as there are any."""
    import resource  # not on Windows

    with contextlib.suppress(ValueError, OSError):  # macOS refuses some
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    from math_verify import parse, verify

    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what libraries print is no answer
    for line in sys.stdin:
        asked = json.loads(line)
        right, answer = (parse(asked[name], parsing_timeout=SECONDS) for name in ("right", "answer"))
        same = bool(right) and bool(answer) and verify(right, answer, timeout_seconds=SECONDS)
        print(json.dumps({"same": same}), file=answers, flush=True)


if __name__ == "__main__":
    serve()
