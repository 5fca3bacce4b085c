"""Hostile programs fail, leave nothing behind, and the evaluator goes on."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from evaluation.sandbox.hostile import BARE, FEW, LINUX, POSIX, WALLED, processes, run, started_in

from pared.evaluation.sandbox import Limits, Program
from pared.evaluation.sandbox.run import WALLS

pytestmark = POSIX
BOTH = pytest.mark.parametrize("walls", [WALLS, BARE], ids=["walls", "bare"])


@pytest.mark.parametrize("source", ["print('hello')", "import sys; sys.stdout = None\nimport math, json, re, heapq"])
@BOTH
def test_a_program_that_ends_well_passes(source: str, walls: tuple[str, ...]) -> None:
    ran = run(source, walls=walls)
    assert ran.passed, ran
    assert ran.why == ""


@pytest.mark.parametrize("source", ["raise SystemExit", "import os; os._exit(0)", "import sys; sys.exit(64)"])
def test_a_program_that_ends_before_its_last_line_does_not_pass(source: str) -> None:
    ran = run(f"{source}\nx = 1\n")
    assert not ran.passed
    assert "before its last line" in ran.why


@pytest.mark.parametrize(
    ("source", "word"),
    [("import sys; sys.exit(3)", ""), ("def f(:", "SyntaxError"), ("x = bytearray(10 * 2**30)", "MemoryError")],
)
def test_a_program_that_ends_badly_fails_and_says_how(source: str, word: str) -> None:
    ran = run(source)
    assert not ran.passed
    assert ran.why.startswith("ended with status")
    assert word in ran.output


def test_a_program_that_ends_while_it_is_tested_fails_and_says_so() -> None:
    ran = run(Program("import os\ndef f(): os._exit(0)", "try: f()\nexcept Exception: pass", calls=("f",)))
    assert not ran.passed
    assert ran.why == "ended with status 0 while it was tested"


def test_a_test_that_fails_is_named() -> None:
    ran = run(Program("def f(x): return x", "assert f(1) == 1\nassert f(2) == 3, 'no'", calls=("f",)))
    assert ran.why == "AssertionError: no (assert f(2) == 3, 'no')"


@BOTH
def test_a_program_that_computes_without_end_is_ended(walls: tuple[str, ...]) -> None:
    why = run("while True: pass", Limits(seconds=1), walls).why
    assert why in ("computed for longer than it may", "ran for more than 5 seconds")  # the latter on a busy machine


def test_a_program_that_waits_without_end_and_ignores_signals_is_ended() -> None:
    source = (
        "import signal, time\nfor number in range(1, 65):\n    try: signal.signal(number, signal.SIG_IGN)\n"
        "    except (OSError, ValueError): pass\nwhile True: time.sleep(1)"
    )
    assert run(source, Limits(seconds=0.2)).why == "ran for more than 1 seconds"


def test_output_without_end_is_cut() -> None:
    ran = run("while True: print('x' * 1000)", Limits(file_bytes=1 << 20))
    assert not ran.passed
    assert len(ran.output) <= 2000


@LINUX
@BOTH
def test_a_child_that_runs_away_is_caught(walls: tuple[str, ...]) -> None:
    away = (
        "import os, time\nif os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0: time.sleep(1000)\n    os._exit(0)"
    )
    assert run(away, walls=walls).passed


@LINUX
@BOTH
def test_a_program_ends_with_the_grader_that_was_killed(walls: tuple[str, ...], tmp_path: Path) -> None:
    grader = (
        "import sys, tempfile\ntempfile.tempdir = sys.argv[1]\n"
        "from pared.evaluation.sandbox import run_program, Limits\n"
        f"run_program('import time; time.sleep(1000)', Limits(seconds=1000), {walls!r})"
    )
    before = processes()
    process = subprocess.Popen([sys.executable, "-c", grader, str(tmp_path)])
    _wait(lambda: len(started_in(str(tmp_path), before)) > 3)  # the grader, the supervisor, the program and its judge
    process.send_signal(signal.SIGKILL)
    process.wait()
    _wait(lambda: not started_in(str(tmp_path), before) and not list(tmp_path.iterdir()))


def _wait(for_what: object) -> None:
    until = time.monotonic() + 60
    while not for_what():  # type: ignore[operator]
        assert time.monotonic() < until
        time.sleep(0.05)


@LINUX
def test_the_environment_is_empty_and_that_of_the_parent_cannot_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A_SECRET", "hunter2")
    assert run("import os\nassert set(os.environ) <= {'LC_CTYPE'}, os.environ").passed  # which Python sets itself


@BOTH
def test_many_open_files_are_refused(walls: tuple[str, ...]) -> None:
    ran = run("files = [open('program.py') for _ in range(500)]", walls=walls)
    assert not ran.passed
    assert "Too many open files" in ran.output


def test_what_walls_a_program_was_without_is_said() -> None:
    assert set(run("", walls=BARE).without) == set(WALLS)


@WALLED
def test_walls_that_a_machine_lacks_are_done_without() -> None:
    assert "a root folder of its own" in run("", FEW, walls=("namespaces", "Landlock")).without
