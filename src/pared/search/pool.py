"""Where candidates are measured: in this process, or in several on this machine."""

import multiprocessing
import signal
import tempfile
from collections import Counter, deque
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import torch

from pared.errors import ParedError
from pared.search.evolution import Candidate, Measured

LIVES = 3  # workers that a candidate may cost before it is given up

Function = Callable[[Candidate], Measured]


class Measures(Protocol):
    """What can be sent to a worker."""

    def __call__(self, candidate: Candidate) -> Measured:
        """Measure a candidate."""

    def final(self, candidate: Candidate) -> Measured:
        """Measure one of the best on the full split."""


def lost(deaths: int) -> Measured:
    """Return what is told of a candidate that was given up."""
    return Measured((), f"{deaths} workers died while measuring it")


class InProcess:
    """Measures where it is asked. Satisfies :class:`pared.search.evolution.Pool`."""

    def __init__(self, measures: Measures) -> None:
        self._measures, self._waiting = measures, deque[tuple[Candidate, bool]]()

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

    What measures is written to a temporary file that all processes map: pages nobody writes to are in memory once.
    A context manager. Satisfies :class:`pared.search.evolution.Pool`.
    """

    def __init__(self, measures: Measures, workers: int) -> None:
        """Write the file and start.

        Args:
            measures: what every worker is given a copy of.
            workers: how many.
        """
        self._threads = max(1, torch.get_num_threads() // workers)
        self._folder = tempfile.TemporaryDirectory(prefix="pared-search-")
        self._file = Path(self._folder.name) / "measures.pt"
        torch.save(measures, self._file)
        self._waiting: deque[tuple[Candidate, bool]] = deque()
        self._deaths: Counter[tuple[int, bool]] = Counter()
        self._workers = [_Worker(self._file, self._threads) for _ in range(workers)]

    def __enter__(self) -> "Processes":
        return self

    def __exit__(
        self, _: type[BaseException] | None, __: BaseException | None, ___: TracebackType | None
    ) -> None:
        for worker in self._workers:
            worker.stop()
        self._folder.cleanup()

    @property
    def pids(self) -> list[int]:
        """Process ids of the workers."""
        return [worker.pid for worker in self._workers]

    def submit(self, candidate: Candidate, final: bool = False) -> None:
        """Give a candidate to a worker that is free, or put it in line."""
        self._waiting.append((candidate, final))
        self._hand_out()

    def next(self) -> tuple[int, Measured]:
        """Wait for any candidate.

        Raises:
            ParedError: a worker could not measure; says why.
        """
        while True:
            self._hand_out()
            busy = {worker.connection: worker for worker in self._workers if worker.task is not None}
            for connection in wait(list(busy)):
                worker = busy[connection]  # type: ignore[index]
                assert worker.task is not None
                task, worker.task = worker.task, None
                try:
                    found = worker.connection.recv()
                except (EOFError, OSError):
                    died = self._died(worker, task)
                    if died is None:
                        continue
                    return task[0].number, died
                if isinstance(found, str):
                    raise ParedError(f"candidate {task[0].program}: {found}")
                return task[0].number, found

    def _died(self, worker: "_Worker", task: tuple[Candidate, bool]) -> Measured | None:
        """Replace a dead worker; return what its candidate gets if it is given up."""
        worker.stop()
        self._workers[self._workers.index(worker)] = _Worker(self._file, self._threads)
        key = (task[0].number, task[1])
        self._deaths[key] += 1
        if self._deaths[key] >= LIVES:
            return lost(LIVES)
        self._waiting.appendleft(task)
        return None

    def _hand_out(self) -> None:
        for worker in self._workers:
            if worker.task is None and self._waiting:
                worker.give(self._waiting.popleft())


class _Worker:
    """One process and the connection to it."""

    def __init__(self, file: Path, threads: int) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.task: tuple[Candidate, bool] | None = None
        self._process = context.Process(target=_serve, args=(file, threads, theirs), daemon=True)
        self._process.start()
        theirs.close()

    @property
    def pid(self) -> int:
        """Of the process."""
        assert self._process.pid is not None
        return self._process.pid

    def give(self, task: tuple[Candidate, bool]) -> None:
        """Send a candidate; one that is dead already shows when its answer is waited for."""
        self.task = task
        with suppress(OSError):
            self.connection.send(task)

    def stop(self) -> None:
        """End the process."""
        self.connection.close()
        self._process.terminate()
        self._process.join()


def _serve(file: Path, threads: int, connection: Connection) -> None:
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
