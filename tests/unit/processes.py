"""Commands and scripts in processes of their own, which a test may kill, without the seconds that imports take.

They are forked from servers that have imported what they need, once for all tests of a session.
"""

import atexit
import functools
import gc
import json
import multiprocessing
import os
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.context import ForkServerProcess
from pathlib import Path

from tqdm import auto, std

_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(
    ["pared.cli.main", "pared.engine", "pared.training", "pared.search", "transformers.trainer", "accelerate"]
)
PATIENCE = 300  # seconds; no test waits longer for what never comes


def start(
    words: Sequence[str], told: Path | None = None, environment: Mapping[str, str] | None = None
) -> ForkServerProcess:
    """Start ``pared`` with these words, on as many threads as the tests.

    Args:
        words: of the command line, without ``pared``.
        told: where what it prints goes; none for nowhere.
        environment: variables beside those of the first test that started one.
    """
    process = _FORKS.Process(target=_run, args=(list(words), str(told or os.devnull), dict(environment or {})))
    process.start()
    return process


def kill_when(words: Sequence[str], seen: Callable[[], bool]) -> None:
    """Start ``pared`` and kill it as soon as this is seen; it must not have ended before."""
    process, until = start(words), time.monotonic() + PATIENCE
    while process.is_alive() and not seen():
        assert time.monotonic() < until, "what the process was to be killed at never came"
        time.sleep(0.01)
    process.kill()
    process.join()
    assert process.exitcode == -9, f"it ended by itself, with {process.exitcode}, before it could be killed"


def forked(work: Callable[[], object]) -> int:
    """Do something in a fork of this process; return its exit code, negative for the signal that killed it.

    Bars of tqdm share a lock with every fork of the process, and one that is killed while it holds it would leave it
    locked for good: a fork takes a lock of its own.
    """
    child = os.fork()
    if child == 0:
        code = 1
        try:
            for kind in (std.tqdm, auto.tqdm):
                kind.set_lock(threading.RLock())
            work()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _run(words: list[str], told: str, environment: dict[str, str]) -> None:
    os.environ.update(environment)
    output = os.open(told, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    import torch

    from pared.cli.commands import app

    torch.set_num_threads(int(os.environ["PARED_TEST_THREADS"]))
    gc.freeze()  # collections leave out what is imported
    app(words)


_SERVER = """
import json, os, sys, traceback
import torch, transformers
from transformers import AutoModelForCausalLM
for line in sys.stdin:
    source, place, told = json.loads(line)
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.chdir(place)
            for stream in (1, 2):
                os.dup2(os.open(told, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
            exec(compile(source, "script", "exec"), {"__name__": "__main__"})
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@functools.cache
def _server() -> subprocess.Popen[str]:
    server = subprocess.Popen([sys.executable, "-c", _SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    atexit.register(server.communicate)  # it ends when nothing more is asked of it
    return server


def run_python(source: str, place: Path) -> None:
    """Run a script in a process that has imported torch and transformers and nothing of pared, in this folder."""
    server, told = _server(), place / "told.txt"
    assert server.stdin is not None
    assert server.stdout is not None
    print(json.dumps([source, str(place), str(told)]), file=server.stdin, flush=True)
    code = server.stdout.readline().strip()
    assert code == "0", told.read_text()[-3000:]


def run_ranks(count: int, work: Callable[[int, Path], None], place: Path) -> None:
    """Run a function of a test file on ranks of a gloo process group; it is given its rank and this folder.

    Args:
        count: of ranks.
        work: a function of a module, which the processes import.
        place: an empty folder, for what the ranks find.
    """
    processes = [_FORKS.Process(target=_rank, args=(rank, count, work, place)) for rank in range(count)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(PATIENCE)
        process.kill()  # where it still waits for another rank
    assert [process.exitcode for process in processes] == [0] * count


def launch(
    count: int, words: Sequence[str], told: Path, before: Callable[[int], object] = int
) -> list[tuple[int | None, str]]:
    """Run ``pared`` in several processes of one job, as torchrun starts them; return their exit codes and outputs.

    Args:
        count: of processes.
        words: of the command line.
        told: a folder for what they print.
        before: a function of a module that is called in each first, with its rank.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": str(count)}
    files = [told / f"told-{rank}.txt" for rank in range(count)]
    ranks = [{**address, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)]
    jobs = [
        _FORKS.Process(target=_launched, args=(rank, list(words), str(files[rank]), ranks[rank], before))
        for rank in range(count)
    ]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join(PATIENCE)
        job.kill()  # where it still waits for another rank
    return [(job.exitcode, file.read_text()) for job, file in zip(jobs, files, strict=True)]


def _launched(
    rank: int, words: list[str], told: str, environment: dict[str, str], before: Callable[[int], object]
) -> None:
    before(rank)
    _run(words, told, environment)


def _rank(rank: int, count: int, work: Callable[[int, Path], None], place: Path) -> None:
    from datetime import timedelta

    import torch
    from torch import distributed

    torch.set_num_threads(1)
    store = distributed.FileStore(str(place / "store"), count)
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=count, timeout=timedelta(seconds=60))
    work(rank, place)
    distributed.destroy_process_group()
