"""Hostile programs fail, leave nothing behind, and the evaluator goes on."""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from unittest.mock import patch

import pytest

from pared.evaluation.sandbox import ExecutionResult, Limits, run_program

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits and walls are those of Linux")

FEW = Limits(seconds=2, memory=1 << 30, file_bytes=1 << 20, processes=12)
HAS_WALLS = not run_program("").without
WALLS = pytest.mark.skipif(not HAS_WALLS, reason="this machine has no namespaces or no Landlock")


def processes() -> set[int]:
    return {int(name) for name in os.listdir("/proc") if name.isdigit()}


def nothing_is_left(before: set[int], place: str) -> bool:
    """Whether no process runs a program from a place; those of others may come and go."""
    for pid in processes() - before:
        try:
            if place in Path(f"/proc/{pid}/cmdline").read_text():
                return False
        except OSError:
            continue
    return True


def run(source: str, limits: Limits = FEW) -> ExecutionResult:
    before = processes()
    with tempfile.TemporaryDirectory() as place, patch("tempfile.tempdir", place):  # other tests run programs too
        ran = run_program(source, limits)
        assert nothing_is_left(before, place)
        assert not os.listdir(place)
    return ran


@pytest.mark.parametrize(
    "source", ["", "print('hello')", "import sys; sys.stdout = None", "import math, json, re, heapq"]
)
def test_a_program_that_ends_well_passes(source: str) -> None:
    ran = run(source)
    assert ran.passed, ran
    assert ran.why == ""


@pytest.mark.parametrize(
    "source", ["exit(0)", "raise SystemExit", "import os; os._exit(0)", "import sys; sys.exit(64)"]
)
def test_a_program_that_ends_before_its_tests_does_not_pass(source: str) -> None:
    ran = run(f"{source}\nassert False\n")
    assert not ran.passed
    assert "before its last line" in ran.why


@pytest.mark.parametrize(
    ("source", "told"),
    [
        ("assert 1 == 2", "AssertionError"),
        ("import sys; sys.exit(3)", ""),
        ("def f(:", "SyntaxError"),
        ("x = bytearray(10 * 2**30)", "MemoryError"),
    ],
)
def test_a_program_that_ends_badly_fails_and_tells(source: str, told: str) -> None:
    ran = run(source)
    assert not ran.passed
    assert ran.why.startswith("ended with status")
    assert told in ran.output


@pytest.mark.parametrize(
    "source",
    [
        "import time; time.sleep(1000)",
        "while True: pass",
        "import signal, time\nfor number in range(1, 65):\n    try: signal.signal(number, signal.SIG_IGN)\n"
        "    except (OSError, ValueError): pass\nwhile True: time.sleep(1)",
    ],
)
def test_a_program_that_does_not_end_is_ended(source: str) -> None:
    start = time.perf_counter()
    ran = run(source)
    assert not ran.passed
    assert ran.why == "ran for more than 2 seconds"
    assert time.perf_counter() - start < 12


def test_a_fork_bomb_is_put_out() -> None:
    ran = run("import os\nwhile True:\n    try: os.fork()\n    except OSError: pass")
    assert not ran.passed
    assert "more than" in ran.why


def test_a_fork_bomb_on_a_busy_machine_leaves_time_to_those_who_watch() -> None:
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(4)]
    try:
        started = time.perf_counter()
        ran = run("import os\nwhile True:\n    try: os.fork()\n    except OSError: pass")
        assert "more than" in ran.why
        assert time.perf_counter() - started < 10
    finally:
        for process in busy:
            process.kill()
            process.wait()


def test_output_without_end_is_cut() -> None:
    ran = run("while True: print('x' * 1000)")
    assert not ran.passed
    assert len(ran.output) <= 2000


def test_a_child_that_runs_away_is_caught() -> None:
    away = (
        "import os, time\nif os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0: time.sleep(1000)\n    os._exit(0)"
    )
    assert run(away).passed


def test_whoever_watches_cannot_be_killed_by_the_program() -> None:
    ran = run("import os, time\ntry: os.kill(os.getppid(), 9)\nexcept OSError: pass\ntime.sleep(0.3)\nassert False")
    assert not ran.passed
    assert ran.why.startswith("ended with status 1") or not HAS_WALLS


def test_the_environment_is_empty_and_that_of_the_parent_cannot_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A_SECRET", "hunter2")
    own = "import os\nassert set(os.environ) <= {'LC_CTYPE'}, os.environ"  # which Python sets itself
    assert run(own).passed
    parents = (
        "import os\nfor name in os.listdir('/proc'):\n    try: text = open(f'/proc/{name}/environ').read()\n"
        "    except OSError: continue\n    assert 'hunter2' not in text"
    )
    ran = run(parents)
    assert ran.passed or not HAS_WALLS


@WALLS
def test_nothing_is_written_outside_its_folder_and_what_it_needs_inside(tmp_path: Path) -> None:
    place = tmp_path / "evil"
    ran = run(f"open({str(place)!r}, 'w').write('x')")
    assert not ran.passed
    assert "PermissionError" in ran.output
    assert not place.exists()
    kept = tmp_path / "kept"
    kept.write_text("mine")
    for act in ("os.remove", "lambda p: os.truncate(p, 0)", "lambda p: os.rename(p, p + '2')"):
        assert not run(f"import os\n({act})({str(kept)!r})").passed
    assert kept.read_text() == "mine"
    assert run("import os\nos.mkdir('d')\nopen('d/a', 'w').write('x')\nassert open('d/a').read() == 'x'").passed


@WALLS
def test_there_is_no_network() -> None:
    ran = run("import socket\nsocket.create_connection(('127.0.0.1', 22), 1)")
    assert not ran.passed
    assert "unreachable" in ran.output


def test_many_open_files_are_refused() -> None:
    ran = run("files = [open('program.py') for _ in range(500)]")
    assert not ran.passed
    assert "Too many open files" in ran.output
