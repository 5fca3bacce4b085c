"""Runs one program it does not trust and its tests, each behind walls, and leaves nothing of them behind.

It is a process of its own and may use the standard library only. Standard input holds two messages: what the program
is, and what its tests are, which only the judge's process reads. A pipe that the evaluator never writes to says by its
end that the evaluator is gone. One JSON object goes to standard output: ``passed``, ``why`` not, ``output`` of the
program, and the walls that it was ``without``.
"""

import fcntl
import json
import os
import select
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any

from . import judge, program, walls
from .tree import remove_tree, used_bytes
from .wire import Channel

SHOWN = 2000  # characters of output
LOOK = 0.05  # seconds between two looks at what no event tells
PATIENCE = 1.0  # seconds that a program may take to end after it closed its channel
SET_SUBREAPER = 36


class Child:
    """A process behind walls.

    Attributes:
        pid: of the process that waits for it.
        missing: walls that could not be had.
        status: how it ended, once it has.
    """

    def __init__(self, wanted: list[str], folder: str, limits: dict[str, float], work: Callable[[], None]) -> None:
        self.missing: list[str] = []
        self.status: int | None = None
        os.mkdir(folder, 0o700)
        while True:
            if walls.NAMESPACES not in wanted:
                walls.hide()
            reader, writer = os.pipe()
            self.pid = os.fork()
            if self.pid == 0:
                os.close(reader)
                _behind(wanted, folder, limits, work, writer)
            os.close(writer)
            with os.fdopen(reader) as pipe:
                told = json.loads(pipe.read() or '{"broken": true}')
            self.missing += told.get("without", [])
            if "lacks" not in told:
                return
            os.waitpid(self.pid, 0)
            self.missing.append(told["lacks"])
            wanted = [wall for wall in wanted if wall != told["lacks"] and not (
                told["lacks"] == walls.NAMESPACES and wall == walls.ROOT)]  # fmt: skip

    def ended(self, seconds: float = 0.0) -> bool:
        """Return whether it has ended, within so many seconds."""
        until = time.monotonic() + seconds
        while self.status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.status = os.waitstatus_to_exitcode(status)
            elif time.monotonic() > until:
                return False
            else:
                time.sleep(0.002)
        return True


def _behind(wanted: list[str], folder: str, limits: dict[str, float], work: Callable[[], None], writer: int) -> None:
    """Go behind walls, say which there are, and work; does not return."""
    try:
        without = walls.enter(wanted, folder, limits)
        os.write(writer, json.dumps({"without": without}).encode())
        os.close(writer)
        work()
    except walls.MissingError as wall:
        os.write(writer, json.dumps({"lacks": str(wall)}).encode())
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(127)


def main(folder: str, lifeline: int) -> None:
    """Judge the program that standard input describes, in this folder, for as long as the lifeline holds."""
    asked = Channel(0, 1).receive()
    limits, wanted = asked["limits"], [wall for wall in asked["walls"] if wall in walls.ALL]
    os.chmod(folder, 0o711)
    if sys.platform == "linux":  # processes that the program leaves become this one's children
        walls.LIBC.prctl(SET_SUBREAPER, 1, 0, 0, 0)
    ours, theirs = socket.socketpair()
    output, written = os.pipe()

    def run() -> None:
        _keep(theirs.fileno(), {1: written, 2: written})
        program.run(asked["source"], Channel(3, 3))

    ran = Child(wanted, f"{folder}/program", limits, run)
    theirs.close()
    os.close(written)
    verdict, told = os.pipe()  # made when the program is elsewhere already

    def test() -> None:
        tests = Channel(0, 0).receive()
        _keep(ours.fileno(), {4: told})
        why = judge.judged(tests["given"], tests["tests"], tests["calls"], Channel(3, 3))
        os.write(4, json.dumps({"passed": not why, "why": why}).encode())
        os._exit(0)

    judging = Child(wanted, f"{folder}/judge", limits, test)
    ours.close()
    os.close(told)
    found = watch(lifeline, output, verdict, limits, f"{folder}/program")
    if not found["passed"] and (found["why"] in ("", judge.ENDED) or judge.GONE in found["why"]):
        found["why"] = _end_of(ran, found["why"]) if ran.ended(PATIENCE) else found["why"] or "its judge ended"
    kill_descendants()
    absent = [wall for wall in walls.ALL if wall not in wanted]
    without = dict.fromkeys([*walls.ABSENT, *absent, *ran.missing, *judging.missing])
    print(json.dumps({**found, "without": list(without)}), flush=True)


def _keep(channel: int, streams: dict[int, int]) -> None:
    """Leave this process a channel, as descriptor 3, these streams, and nothing else."""
    wanted = {0: os.open(os.devnull, os.O_RDWR), 3: channel, **streams}
    wanted = {1: wanted[0], 2: wanted[0], **wanted}
    high = {target: fcntl.fcntl(source, fcntl.F_DUPFD, 10) for target, source in wanted.items()}
    for target, source in high.items():
        os.dup2(source, target)
    os.closerange(max(3, *streams) + 1, 256)


def _end_of(ran: Child, why: str) -> str:
    """Return how a program ended that did not come to the end of its tests."""
    status = ran.status or 0
    number = -status if status < 0 else status - 128 if status > 128 else 0
    try:
        if number == signal.SIGXCPU:
            return "computed for longer than it may"
        if number:
            return f"was ended by {signal.Signals(number).name}"
    except ValueError:
        pass
    return f"ended with status {status} {'before its last line' if why == judge.ENDED else 'while it was tested'}"


def watch(lifeline: int, output: int, verdict: int, limits: dict[str, float], folder: str) -> dict[str, Any]:
    """Wait for the judge; stop waiting where it takes too long, writes too much or becomes too many."""
    until = time.monotonic() + limits["clock"]
    poll = select.poll()
    for descriptor, events in ((lifeline, 0), (output, select.POLLIN), (verdict, select.POLLIN)):
        poll.register(descriptor, events)
    tail, count, word, why = b"", 0, b"", ""
    while not why:
        ready = {descriptor for descriptor, _ in poll.poll(LOOK * 1000)}
        if lifeline in ready:
            kill_descendants()
            remove_tree(os.path.dirname(folder))
            os._exit(1)
        if output in ready:
            piece = os.read(output, 1 << 16)
            tail, count = (tail + piece)[-4 * SHOWN :], count + len(piece)
            if not piece:
                poll.unregister(output)
        if verdict in ready:
            word = os.read(verdict, 1 << 16)
            break
        why = _too_much(until, count, limits, folder)
    found = json.loads(word) if word else {"passed": False, "why": why}
    return {**found, "output": (tail + _rest(output)).decode(errors="replace")[-SHOWN:]}


def _too_much(until: float, written: int, limits: dict[str, float], folder: str) -> str:
    if time.monotonic() > until:
        return f"ran for more than {limits['clock']:g} seconds"
    if written > limits["file_bytes"]:
        return f"printed more than {limits['file_bytes']:,.0f} bytes"
    if used_bytes(folder, limits["disk_bytes"]) > limits["disk_bytes"]:
        return f"wrote more than {limits['disk_bytes']:,.0f} bytes of files"
    if len(descendants()) > limits["processes"] + 8:  # where the kernel does not count them
        return f"became more than {limits['processes']:g} processes"
    return ""


def _rest(output: int) -> bytes:
    """Return what was printed and not yet read."""
    os.set_blocking(output, False)
    try:
        return os.read(output, 1 << 16)
    except OSError:
        return b""


def descendants() -> list[int]:
    """Return the processes under this one, as far as the system lists them."""
    parents: dict[int, int] = {}
    for name in os.listdir("/proc") if os.path.isdir("/proc/self") else ():
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


def kill_descendants() -> None:
    """Kill remaining processes until none is left."""
    for _ in range(1000):
        left = descendants()
        for pid in left:
            try:
                os.kill(pid, signal.SIGKILL)
            except OSError:
                continue
        try:
            while left:
                pid, _status = os.waitpid(-1, os.WNOHANG)
                if not pid:
                    break
        except ChildProcessError:
            return
        if not left:
            return
        time.sleep(0.001)
