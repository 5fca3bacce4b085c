"""Running programs that are up to no good, and what is left of them."""

import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from unittest.mock import patch

import pytest

from pared.evaluation.sandbox import ExecutionResult, Limits, Program, run_program
from pared.evaluation.sandbox.run import WALLS

POSIX = pytest.mark.skipif(not hasattr(os, "fork"), reason="programs are run where there is fork")
LINUX = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="these walls are those of Linux")
FEW = Limits(seconds=10, memory=1 << 30, file_bytes=1 << 20, disk_bytes=4 << 20, processes=12)
MISSING = run_program("").without if hasattr(os, "fork") else WALLS
WALLED = pytest.mark.skipif(bool(MISSING), reason=f"this machine has no {', '.join(MISSING)}")
BARE: tuple[str, ...] = ()  # no wall at all: what is promised then is promised everywhere


def processes() -> set[int]:
    return {int(name) for name in os.listdir("/proc") if name.isdigit()} if os.path.isdir("/proc") else set()


def started_in(place: str, before: set[int]) -> list[int]:
    """Return processes that were started with a place; those of others may come and go."""
    found = []
    for pid in processes() - before:
        try:
            if place in Path(f"/proc/{pid}/cmdline").read_text():
                found.append(pid)
        except OSError:
            continue
    return found


def run(
    program: Program | str, limits: Limits = FEW, walls: Sequence[str] = WALLS, mode: int = 0o711
) -> ExecutionResult:
    """Run a program, in a folder of a mode, and see that no process and no file of it is left."""
    before = processes()
    with tempfile.TemporaryDirectory() as place, patch("tempfile.tempdir", place):  # other tests run programs too
        os.chmod(place, mode)
        ran = run_program(program, limits, walls)
        assert not started_in(place, before)
        assert not os.listdir(place)
    return ran
