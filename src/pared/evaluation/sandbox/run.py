"""Programs that a model wrote, run and judged within limits. Not a security boundary: a virtual machine is one."""

import contextlib
import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pared.errors import ParedError
from pared.evaluation.sandbox.tree import remove_tree
from pared.evaluation.sandbox.wire import framed

log = logging.getLogger(__name__)

# The supervisor's files as a package of their own: nothing of pared is imported, no variable of the environment read.
START = """
import sys, types
package = types.ModuleType("sandbox")
package.__path__ = [sys.argv[1]]
sys.modules["sandbox"] = package
from sandbox.supervisor import main
main(sys.argv[2], int(sys.argv[3]))
"""
WALLS = ("namespaces", "a root folder of its own", "Landlock", "an unprivileged user")
PATIENCE = 5  # seconds on the clock for every second of processor time
GRACE = 60.0  # seconds over the limit until the supervisor itself is ended, on a loaded machine


@dataclass(frozen=True)
class Limits:
    """What a program may take; its judge is given as much.

    Attributes:
        seconds: of processor time, for every process; on the clock ``PATIENCE`` times as many, as machines are busy.
        memory: bytes of address space, for every process.
        file_bytes: of the largest file it writes, and of what it prints.
        disk_bytes: of all its files together.
        processes: at the same time.
        open_files: at the same time, for every process.
    """

    seconds: float = 10.0
    memory: int = 1 << 30
    file_bytes: int = 10 << 20
    disk_bytes: int = 64 << 20
    processes: int = 16
    open_files: int = 64


@dataclass(frozen=True)
class Program:
    """What a model wrote, and what says whether it is right.

    Attributes:
        source: of the program; not trusted.
        tests: statements that fail where the program is wrong; trusted. They run in another process, which calls the
            program's functions and gets plain data back, or handles.
        given: trusted definitions that the tests use.
        calls: names of the program's that the tests use; they stand for the program's own, whatever ``given`` says.
    """

    source: str
    tests: str = ""
    given: str = ""
    calls: tuple[str, ...] = ()


@dataclass(frozen=True)
class ExecutionResult:
    """What became of a program.

    Attributes:
        passed: whether it came to its last line and its tests to theirs.
        why: how it failed, in words.
        output: the end of what it wrote.
        without: walls that this machine does not have, of ``WALLS``.
    """

    passed: bool
    why: str
    output: str
    without: tuple[str, ...] = ()


def run_program(program: Program | str, limits: Limits | None = None, walls: Sequence[str] = WALLS) -> ExecutionResult:
    """Run a Python program in a folder of its own, which is removed, without environment, and its tests elsewhere.

    Args:
        program: with its tests, or the text of one without.
        limits: what it may take.
        walls: to put it behind, as far as the machine has them.

    Raises:
        ParedError: this system has no processes that fork and are limited: it is neither Linux nor macOS.
    """
    if not hasattr(os, "fork"):
        raise ParedError("programs are run on Linux and macOS only, where processes can be limited")
    if isinstance(program, str):
        program = Program(program)
    limits = limits or Limits()
    request = {
        "source": program.source,
        "limits": {**asdict(limits), "clock": PATIENCE * limits.seconds},
        "walls": list(walls),
    }
    tests = {"tests": program.tests, "given": program.given, "calls": program.calls}
    folder = tempfile.mkdtemp(prefix="pared-program-")
    try:
        found, log_text = _supervised(folder, framed(request) + framed(tests), PATIENCE * limits.seconds + GRACE)
    finally:
        if not remove_tree(folder):
            log.warning("the folder of a program, %s, could not be removed", folder)
    if found is None:
        return ExecutionResult(False, f"its supervisor ended ({log_text or 'no word'})", "")
    return ExecutionResult(found["passed"] is True, str(found["why"]), str(found["output"]), tuple(found["without"]))


def _supervised(folder: str, messages: bytes, seconds: float) -> tuple[dict[str, Any] | None, str]:
    """Return what a supervisor reports, None if it did not get that far; all of its group is gone then."""
    lifeline, held = os.pipe()  # the supervisor reads its end where this process is gone, however it went
    try:
        process = subprocess.Popen(
            [sys.executable, "-I", "-c", START, str(Path(__file__).parent), folder, str(lifeline)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={},
            start_new_session=True,
            pass_fds=[lifeline],
            cwd="/",
        )
        os.close(lifeline)
        try:
            verdict, errors = process.communicate(messages, timeout=seconds)
            return json.loads(verdict), ""
        except subprocess.TimeoutExpired:
            return None, "it did not end in time"
        except ValueError:
            return None, errors.decode(errors="replace").strip()[-200:]
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    finally:
        os.close(held)
