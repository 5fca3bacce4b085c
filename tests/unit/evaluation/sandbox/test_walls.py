"""What a program cannot reach, read, change or fill."""

import json
import os
import socket
from pathlib import Path

import pytest
from evaluation.sandbox.hostile import BARE, LINUX, WALLED, run

from pared.evaluation.sandbox import Limits
from pared.evaluation.sandbox.run import WALLS

pytestmark = LINUX
LANDLOCKED = ("Landlock", "an unprivileged user")


@WALLED
@pytest.mark.parametrize("walls", [WALLS, LANDLOCKED], ids=["all", "landlock"])
def test_nothing_outside_its_folder_is_written_or_read(tmp_path: Path, walls: tuple[str, ...]) -> None:
    kept = tmp_path / "kept"
    kept.write_text("mine")
    kept.chmod(0o666)
    source = f"""
import os
kept = {str(kept)!r}
for act in (
    lambda: open(kept), lambda: open(kept, "w"), lambda: open(kept + "2", "w"), lambda: os.remove(kept),
    lambda: os.truncate(kept, 0), lambda: os.rename(kept, kept + "2"), lambda: os.listdir({str(tmp_path)!r}),
    lambda: open("/etc/passwd"),
):
    try: act()
    except OSError: continue
    raise AssertionError("it could")
os.mkdir("d")
open("d/a", "w").write("x")
assert open("d/a").read() == "x"
"""
    ran = run(source, walls=walls)
    assert ran.passed, ran
    assert kept.read_text() == "mine"
    assert os.listdir(tmp_path) == ["kept"]


@WALLED
def test_a_program_in_a_folder_of_the_superuser_alone_is_judged_and_not_failed() -> None:
    """Regression: another user could not reach it, and every program "ended with status 127"."""
    ran = run("assert True", walls=LANDLOCKED, mode=0o700)
    assert ran.passed, ran
    assert os.geteuid() or "an unprivileged user" in ran.without


@WALLED
def test_modes_times_attributes_and_sockets_outside_its_folder_cannot_be_touched(tmp_path: Path) -> None:
    kept, address = tmp_path / "kept", tmp_path / "socket"
    kept.write_text("mine")
    kept.chmod(0o600)
    os.utime(kept, (1, 1))
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(address))
        server.listen()
        source = f"""
import os, socket
kept, python = {str(kept)!r}, os.__file__
def connect():
    with socket.socket(socket.AF_UNIX) as client: client.connect({str(address)!r})
for act in (
    lambda: os.chmod(kept, 0o777), lambda: os.utime(kept), lambda: os.setxattr(kept, "user.a", b"b"), connect,
    lambda: os.chmod(python, 0o777), lambda: os.utime(python), lambda: open(python, "a"), lambda: os.mkdir("/new"),
    lambda: os.chmod("/dev/null", 0), lambda: os.chown(kept, 0, 0), lambda: os.listdir("/proc"),
):
    try: act()
    except OSError: continue
    raise AssertionError("it could")
"""
        ran = run(source)
        assert ran.passed, ran
    assert kept.stat().st_mtime == 1
    assert kept.stat().st_mode & 0o777 == 0o600


@WALLED
def test_there_is_no_network_and_no_other_process() -> None:
    ran = run(
        "import os, socket\nassert os.getppid() <= 1 and os.getpid() < 9\n"
        "try: socket.create_connection(('127.0.0.1', 22), 1)\n"
        "except OSError as error: assert 'unreachable' in str(error)"
    )
    assert ran.passed, ran


@WALLED
def test_a_program_is_nobody_and_has_no_way_to_become_somebody() -> None:
    source = """
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
assert 0 not in os.getresuid() + os.getresgid() and os.getgroups() in ([], [65534], [os.getgid()]), os.getgroups()
for flags in (0x10000000, 0x20000, 0x40000000, 0x10000000 | 0x20000):
    assert libc.unshare(flags) == -1
assert libc.mount(b"tmpfs", b"/tmp", b"tmpfs", 0, None) == -1 and libc.chroot(b".") == -1
for act in (lambda: os.setuid(0), lambda: os.setgid(0), lambda: os.setgroups([0]), lambda: os.mknod("m", 0o20666, 261)):
    try: act()
    except OSError: continue
    raise AssertionError("it could")
"""
    ran = run(source)
    assert ran.passed, ran


@pytest.mark.skipif(os.geteuid() != 0, reason="of the superuser's programs")
@WALLED
def test_a_program_of_the_superuser_is_another_user_outside_too() -> None:
    ran = run("import os\nos.write(1, str(os.stat('program.py').st_uid).encode())\nassert os.getuid() == 1000")
    assert ran.passed, ran


@WALLED
def test_processes_are_limited_for_the_superuser_too() -> None:
    bounded = """
import os, time
begun = 0
for _ in range(40):
    try: child = os.fork()
    except OSError: break
    if child == 0:
        time.sleep(60)
        os._exit(0)
    begun += 1
assert 0 < begun <= 12, begun
"""
    ran = run(bounded)
    assert ran.passed, ran


def test_processes_are_counted_where_the_kernel_does_not() -> None:
    many = "import os, time\nfor _ in range(30):\n    if os.fork() == 0: break\ntime.sleep(60)"
    ran = run(many, walls=BARE)
    assert not ran.passed  # the superuser's are counted by the supervisor, all others' by the kernel
    assert "processes" in ran.why or "BlockingIOError" in ran.output


@pytest.mark.parametrize("walls", [WALLS, BARE], ids=["all", "bare"])
def test_files_are_limited_together(walls: tuple[str, ...]) -> None:
    fill = """
import time
for number in range(40):
    with open(f"f{number}", "wb") as file: file.write(bytes(1 << 19))
time.sleep(60)
"""
    ran = run(fill, walls=walls)
    assert not ran.passed
    assert "No space left" in ran.output or "bytes of files" in ran.why


@pytest.mark.parametrize("walls", [WALLS, BARE], ids=["all", "bare"])
def test_deep_folders_and_closed_ones_are_removed(walls: tuple[str, ...]) -> None:
    source = """
import os
os.mkdir("closed")
open("closed/file", "w").write("x")
os.mkdir("closed/more")
os.chmod("closed/more", 0)
os.chmod("closed", 0)
os.symlink("/", "out")
for _ in range(60):  # three times the longest path
    os.mkdir("d" * 200)
    os.chdir("d" * 200)
"""
    ran = run(source, Limits(seconds=10), walls)
    assert ran.passed or not walls, ran  # without walls what cannot be counted may be found full


def test_a_folder_that_may_not_be_counted_is_full(tmp_path: Path) -> None:
    from pared.evaluation.sandbox.tree import LOOKED_AT, used_bytes

    (tmp_path / "file").write_bytes(bytes(10_000))
    assert 10_000 <= used_bytes(str(tmp_path), 1 << 20) < 100_000
    assert used_bytes(str(tmp_path / "none"), 1) == 0
    assert used_bytes(str(tmp_path), float(LOOKED_AT)) >= 10_000


def test_the_supervisors_walls_are_those_that_are_asked_for() -> None:
    from pared.evaluation.sandbox import walls

    assert set(walls.ALL) | set(walls.ABSENT) == set(WALLS)
    assert json.dumps(sorted(walls.readable()))
