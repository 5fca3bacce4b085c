"""Runs one program it does not trust, within limits, and leaves nothing of it behind. Started with ``python -I``.

It is a program of its own and may use the standard library only. Arguments: the limits as JSON, and the file to run. It
writes one JSON object to standard output: ``exit`` (the program's exit status, negative for a signal), ``why`` (what
ended it, if not itself) and ``without`` (walls that this machine does not have). What the program writes goes to
``output`` in its folder, cut at the limit on files.

Walls, as far as the system has them: namespaces of its own for processes, users and the network; Landlock, so that
nothing is written outside its folder and no signal leaves it; limits on memory, processor time, files and open files;
a count of processes, looked at a hundred times a second.
"""

import ctypes
import json
import os
import resource
import signal
import struct
import sys
import time

LIBC = ctypes.CDLL(None, use_errno=True)
NEW_USER, NEW_PID, NEW_NET = 0x10000000, 0x20000000, 0x40000000
SET_NO_NEW_PRIVILEGES, SET_SUBREAPER = 38, 36
LANDLOCK_CREATE, LANDLOCK_ADD, LANDLOCK_RESTRICT = 444, 445, 446
WRITES = 0x3FF2 | 0x4000  # every right of files that changes something, up to truncating; not executing and reading
EXECUTABLE = sys.executable
PAUSE = 0.01


def main() -> None:
    """Run the program that the arguments name."""
    limits, program = json.loads(sys.argv[1]), sys.argv[2]
    come_first()
    LIBC.prctl(SET_SUBREAPER, 1, 0, 0, 0)  # processes that the program leaves become this one's children
    without = []
    apart = LIBC.unshare(NEW_USER | NEW_PID | NEW_NET) == 0
    if not apart:
        without.append("namespaces")
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        try:
            become(limits, program, writer, apart)
        finally:
            os._exit(127)
    os.close(writer)
    status, why = watch(child, limits)
    reply = os.read(reader, 4096).decode()
    without += [wall for wall in reply.split(",") if wall]
    kill_descendants()
    print(json.dumps({"exit": os.waitstatus_to_exitcode(status), "why": why, "without": without}), flush=True)


def come_first() -> None:
    """Be scheduled before whatever the program starts, where that is allowed.

    A limit on processes does not bind the superuser, who may do this; anybody else is bound by that limit. Without it
    thousands of processes leave the one that counts them no time to count.
    """
    try:
        os.sched_setscheduler(0, os.SCHED_RR | os.SCHED_RESET_ON_FORK, os.sched_param(1))
    except (AttributeError, OSError):
        return


def become(limits: dict[str, float], program: str, writer: int, apart: bool) -> None:
    """Become the program, or where there is a namespace its first process, which ends with it."""
    if not restrict(os.path.dirname(program)):
        os.write(writer, b"landlock")
    os.close(writer)
    if apart:
        inner = os.fork()
        if inner:
            status = reap_until(inner)
            code = os.waitstatus_to_exitcode(status)
            os._exit(code if code >= 0 else 128 - code)
    for what, value in (
        (resource.RLIMIT_AS, limits["memory"]),
        (resource.RLIMIT_CPU, limits["seconds"] + 1),
        (resource.RLIMIT_FSIZE, limits["file_bytes"]),
        (resource.RLIMIT_NOFILE, limits["open_files"]),
        (resource.RLIMIT_NPROC, limits["processes"]),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(what, (int(value), int(value)))
    os.chdir(os.path.dirname(program))
    os.nice(5)  # the watcher comes first
    nothing = os.open(os.devnull, os.O_RDONLY)
    output = os.open("output", os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND, 0o600)
    os.dup2(nothing, 0)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.closerange(3, 256)
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    os.execve(EXECUTABLE, [EXECUTABLE, "-I", program], {})


def reap_until(inner: int) -> int:
    """Wait as the first process of a namespace: for anybody, until the program itself has ended."""
    while True:
        pid, status = os.wait()
        if pid == inner:
            return status


def restrict(folder: str) -> bool:
    """Let this process and its children write to this folder alone and signal no process outside; return whether so."""
    version = LIBC.syscall(LANDLOCK_CREATE, None, 0, 1)
    if version < 3:  # truncating could not be kept from files outside
        return False
    scoped = 0b11 if version >= 6 else 0  # abstract sockets and signals
    attributes = struct.pack("QQQ", WRITES, 0, scoped)[: 24 if version >= 6 else 16 if version >= 4 else 8]
    ruleset = LIBC.syscall(LANDLOCK_CREATE, attributes, len(attributes), 0)
    if ruleset < 0:
        return False
    for path, rights in ((folder, WRITES), (os.devnull, 0x2 | 0x4000)):
        place = os.open(path, os.O_PATH)
        rule = struct.pack("=Qi", rights, place)
        if LIBC.syscall(LANDLOCK_ADD, ruleset, 1, rule, 0) != 0:
            return False
        os.close(place)
    LIBC.prctl(SET_NO_NEW_PRIVILEGES, 1, 0, 0, 0)
    done = LIBC.syscall(LANDLOCK_RESTRICT, ruleset, 0) == 0
    os.close(ruleset)
    return bool(done)


def watch(child: int, limits: dict[str, float]) -> tuple[int, str]:
    """Wait for the program; end it where it takes too long or becomes too many."""
    end = time.monotonic() + limits["seconds"]
    why = ""
    while True:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return status, why
        if not why and time.monotonic() > end:
            why = f"ran for more than {limits['seconds']:g} seconds"
        if not why and len(descendants()) > limits["processes"]:
            why = f"became more than {limits['processes']:g} processes"
        if why:
            os.kill(child, signal.SIGKILL)  # of a namespace the first process: the kernel ends all others with it
            kill_descendants(but=child)
        time.sleep(PAUSE)


def descendants() -> list[int]:
    """Return the processes under this one."""
    parents: dict[int, int] = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                with open(f"/proc/{name}/stat", encoding="utf-8", errors="replace") as stat:
                    parents[int(name)] = int(stat.read().rpartition(")")[2].split()[1])
            except (OSError, IndexError):
                continue
    found: list[int] = []
    ring = [os.getpid()]
    while ring:
        ring = [pid for pid, parent in parents.items() if parent in ring]
        found += ring
    return found


def kill_descendants(but: int = 0) -> None:
    """Kill remaining processes until none is left."""
    for _ in range(1000):
        left = [pid for pid in descendants() if pid != but]
        for pid in left:
            try:
                os.kill(pid, signal.SIGKILL)
            except OSError:
                continue
        try:
            while left:
                pid, _status = os.waitpid(-1, os.WNOHANG) if not but else (0, 0)
                if not pid:
                    break
        except ChildProcessError:
            return
        if not left:
            return
        time.sleep(0.001)


if __name__ == "__main__":
    main()
