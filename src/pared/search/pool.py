"""Where candidates are measured: in this process, or in several on this machine."""

import multiprocessing
import signal
from collections import Counter, deque
from collections.abc import Callable
from contextlib import ExitStack, suppress
from multiprocessing.connection import Connection, wait
from multiprocessing.context import BaseContext
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import torch

from pared.errors import ParedError
from pared.io.leftovers import scratch
from pared.names import called
from pared.search.evolution import Candidate, Measured

LIVES = 3  # workers that a candidate may cost before it is given up

Function = Callable[[Candidate], Measured]


class Measures(Protocol):
    """What can be sent to a worker."""

    def __call__(self, candidate: Candidate) -> Measured:
        """Measure a candidate."""

    def final(self, candidate: Candidate) -> Measured:
        """Measure one of the best on the full split."""


Task = tuple[Candidate, bool]  # whether it is to be measured on the full split


class Queue:
    """Who waits for a worker, and how many workers each has cost.

    Attributes:
        waiting: in line.
    """

    def __init__(self) -> None:
        self.waiting: deque[Task] = deque()
        self._deaths: Counter[tuple[int, bool]] = Counter()
        self._alive = False

    def took(self, task: Task, found: Measured | str) -> tuple[int, Measured]:
        """Take in what a worker says.

        Raises:
            ParedError: that it could not measure.
        """
        if isinstance(found, str):
            raise ParedError(f"candidate {task[0].program}: {found}")
        self._alive = True
        return task[0].number, found

    def died(self, task: Task) -> tuple[int, Measured] | None:
        """Put a candidate whose worker died in line again; return what is told of it once it is given up.

        Raises:
            ParedError: no worker has ever measured anything.
        """
        key = (task[0].number, task[1])
        self._deaths[key] += 1
        if self._deaths[key] < LIVES:
            self.waiting.appendleft(task)
            return None
        if not self._alive:
            raise ParedError(f"{LIVES} workers died at their first candidate; is there memory for so "
                             f"many ({called('workers')})?")  # fmt: skip
        return task[0].number, Measured((), f"{LIVES} workers died while measuring it")


class InProcess:
    """Measures where it is asked. Satisfies :class:`pared.search.evolution.Pool`."""

    def __init__(self, measures: Measures) -> None:
        self._measures, self._waiting = measures, deque[Task]()

    def __enter__(self) -> "InProcess":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def submit(self, candidate: Candidate, final: bool = False) -> None:
        """Put a candidate in line."""
        self._waiting.append((candidate, final))

    def next(self) -> tuple[int, Measured]:
        """Measure the first in line."""
        candidate, final = self._waiting.popleft()
        return candidate.number, (self._measures.final if final else self._measures)(candidate)


class Processes:
    """Measures in processes of its own; one that dies is replaced, and its candidate measured again.

    What measures is written to a temporary file that all processes map: unwritten pages are in memory once.
    A context manager. Satisfies :class:`pared.search.evolution.Pool`.
    """

    def __init__(self, measures: Measures, workers: int) -> None:
        """Write the file and start.

        Args:
            measures: what every worker is given a copy of.
            workers: how many.
        """
        self._threads = max(1, torch.get_num_threads() // workers)
        self._stack = ExitStack()
        self._file = self._stack.enter_context(scratch(None)) / "measures.pt"
        torch.save(measures, self._file)
        self._queue = Queue()
        self._workers = [_Worker(self._file, self._threads) for _ in range(workers)]

    def __enter__(self) -> "Processes":
        return self

    def __exit__(self, _: type[BaseException] | None, __: BaseException | None, ___: TracebackType | None) -> None:
        for worker in self._workers:
            worker.stop()
        self._stack.close()

    @property
    def pids(self) -> list[int]:
        """Process ids of the workers."""
        return [worker.pid for worker in self._workers]

    def submit(self, candidate: Candidate, final: bool = False) -> None:
        """Give a candidate to a worker that is free, or put it in line."""
        self._queue.waiting.append((candidate, final))
        self._dispatch()

    def next(self) -> tuple[int, Measured]:
        """Wait for any candidate.

        Raises:
            ParedError: a worker could not measure; says why.
        """
        while True:
            self._dispatch()
            busy: dict[object, _Worker] = {one.connection: one for one in self._workers if one.task is not None}
            worker = busy[wait([one.connection for one in self._workers if one.task is not None])[0]]
            assert worker.task is not None
            task, worker.task = worker.task, None
            try:
                found = worker.connection.recv()
            except (EOFError, OSError):
                worker.stop()
                self._workers[self._workers.index(worker)] = _Worker(self._file, self._threads)
                given_up = self._queue.died(task)
                if given_up is not None:
                    return given_up
            else:
                return self._queue.took(task, found)

    def _dispatch(self) -> None:
        for worker in self._workers:
            if worker.task is None and self._queue.waiting:
                worker.give(self._queue.waiting.popleft())


class _Worker:
    """One process and the connection to it."""

    def __init__(self, file: Path, threads: int) -> None:
        context = _context()
        self.connection, theirs = context.Pipe()
        self.task: Task | None = None
        self._process = context.Process(  # type: ignore[attr-defined]
            target=_worker_loop, args=(file, threads, theirs), daemon=True
        )
        self._process.start()
        theirs.close()

    @property
    def pid(self) -> int:
        """Of the process."""
        assert self._process.pid is not None
        return self._process.pid

    def give(self, task: Task) -> None:
        """Send a candidate; one that is dead already shows when its answer is waited for."""
        self.task = task
        with suppress(OSError):
            self.connection.send(task)

    def stop(self) -> None:
        """End the process."""
        self.connection.close()
        self._process.terminate()
        self._process.join()


def _context() -> BaseContext:
    """Return how processes start: from one that has imported everything and run nothing, where the system has it."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["pared.entrypoints.search"])
    return context


def _worker_loop(file: Path, threads: int, connection: Connection) -> None:
    """Measure what comes in until the other side is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that began the search
    torch.set_num_threads(threads)
    measures: Any = None
    while True:
        try:
            candidate, final = connection.recv()
        except (EOFError, OSError):
            return
        try:
            if measures is None:
                measures = torch.load(file, mmap=True, weights_only=False)  # our own file; writes stay private
            found: Measured | str = (measures.final if final else measures)(candidate)
        except Exception as error:  # told where it can be read
            found = f"{type(error).__name__}: {error}"
        connection.send(found)
