"""Untrusted programs, run within limits. Not a security boundary: a container is one, or a virtual machine."""

import contextlib
import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pared.errors import ParedError

SUPERVISOR = Path(__file__).with_name("supervisor.py")
GRACE = 60.0  # seconds over the limit until the supervisor itself is ended: on a loaded machine a fork bomb dies slowly
SHOWN = 2000  # characters of output
FIRST, STATUSES = 65, 48  # of the exit statuses that mean nothing by themselves


@dataclass(frozen=True)
class Limits:
    """What a program may take.

    Attributes:
        seconds: of wall-clock time, and one more of processor time for every process.
        memory: bytes of address space, for every process.
        file_bytes: of the largest file it writes, its output included.
        processes: at the same time.
        open_files: at the same time, for every process.
    """

    seconds: float = 10.0
    memory: int = 1 << 30
    file_bytes: int = 10 << 20
    processes: int = 16
    open_files: int = 64


@dataclass(frozen=True)
class ExecutionResult:
    """What became of a program.

    Attributes:
        passed: whether it came to its last line.
        why: how it failed, in words.
        output: the end of what it wrote.
        without: walls that this machine does not have; ``namespaces``, ``landlock``.
    """

    passed: bool
    why: str
    output: str
    without: tuple[str, ...] = ()


def run_program(source: str, limits: Limits | None = None) -> ExecutionResult:
    """Run the text of a Python program in a folder of its own, which is removed, with an empty environment.

    Args:
        source: the program.
        limits: what it may take.

    Raises:
        ParedError: this system has no process groups and limits: it is not Linux.
    """
    if not sys.platform.startswith("linux"):
        raise ParedError("programs are run on Linux only, where their memory, processes and files can be limited")
    limits = limits or Limits()
    with tempfile.TemporaryDirectory(prefix="pared-program-", ignore_cleanup_errors=True) as folder:
        program = Path(folder) / "program.py"
        end = FIRST + secrets.randbelow(STATUSES)  # a status that the program does not know beforehand
        last = f"\nprint(end='', flush=True)\n__import__('os')._exit({end})\n"
        program.write_text(source + last, encoding="utf-8", errors="surrogatepass")
        command = [sys.executable, "-I", str(SUPERVISOR), json.dumps(asdict(limits)), str(program)]
        verdict, log = _supervised(command, limits.seconds + GRACE)
        output = _read(Path(folder) / "output")
    if verdict is None:
        return ExecutionResult(False, f"its supervisor ended ({log or 'no word'})", output)
    status, why, without = int(verdict["exit"]), str(verdict["why"]), tuple(verdict["without"])
    if not why and status != end:
        why = _signal(status) or f"ended with status {status} before its last line"
    return ExecutionResult(not why, why, output, without)


def _supervised(command: list[str], seconds: float) -> tuple[dict[str, Any] | None, str]:
    """Return what a supervisor reports, None if it did not get that far; all of its group is gone then."""
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={},
        start_new_session=True,
        cwd="/",
    )
    try:
        verdict, log = process.communicate(timeout=seconds)
        return json.loads(verdict), ""
    except subprocess.TimeoutExpired:
        return None, "it did not end in time"
    except ValueError:
        return None, log.decode(errors="replace").strip()[-200:]
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _signal(status: int) -> str:
    number = -status if status < 0 else status - 128 if status > 128 else 0
    try:
        return f"was ended by {signal.Signals(number).name}" if number else ""
    except ValueError:
        return ""


def _read(path: Path) -> str:
    try:
        with path.open("rb") as file:
            file.seek(0, os.SEEK_END)
            file.seek(max(0, file.tell() - SHOWN))
            return file.read().decode(errors="replace")
    except OSError:
        return ""
