"""Whether code that lies in a model's folder may run: never, unless the user says so for this call or command.

Transformers would ask at the terminal, and take an answer from a pipe. Here there is no prompt: everything that loads
something of a model passes :func:`trusted` on, and what needs more is refused with the name of the option.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

# Set by the command line for its own process and the processes it starts.
VARIABLE = "PARED_TRUST_REMOTE_CODE"

_allowed: ContextVar[bool] = ContextVar("trust_remote_code", default=False)


def trusted() -> bool:
    """Whether the code of a folder may run."""
    return _allowed.get() or os.environ.get(VARIABLE) == "1"


@contextmanager
def trusting(allowed: bool) -> Iterator[None]:
    """Let the code of folders run inside, if it is allowed."""
    before = _allowed.set(allowed or _allowed.get())
    try:
        yield
    finally:
        _allowed.reset(before)


@contextmanager
def trusting_everywhere() -> Iterator[None]:
    """Let the code of folders run in this process and in those it starts: what the option of a command does."""
    before = os.environ.get(VARIABLE)
    os.environ[VARIABLE] = "1"
    try:
        yield
    finally:
        os.environ.pop(VARIABLE)
        if before is not None:
            os.environ[VARIABLE] = before
