"""A micro-benchmark of this machine: every operation that occurs, at its size or at the largest that is quick."""

import json
import math
import platform
import statistics
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from pared.engine.cost.primitives import LIMITS, SLOWEST, prepared
from pared.environment import choose_dtype, machine, processors, versions
from pared.io.files import cache_folder, write_whole
from pared.operations import Operation

WEEK = 7 * 24 * 3600  # seconds after which a machine is measured again
ENOUGH = 0.04  # seconds that one operation is repeated for, at least twice; one that takes longer ten times runs once
# What is done at once to see how much slower two threads are than one: what blocks do most, and what solving does.
AT_ONCE = (Operation("product", (1024, 1024, 1024), "float32"), Operation("eigh", (576,), "float64"))
LONG_ENOUGH, BESIDE = 0.5, "beside"  # seconds of it, and the name of what is found
LEAST, MOST = 0.75, 1.15  # exponents of time against operations; outside of it is noise


class Measured:
    """This machine, measured as operations occur. Satisfies :class:`pared.engine.cost.rates.Rates`.

    What was measured is kept in a file of the user's cache folder, and is measured again after a week, or with another
    torch, processor or number of threads.

    Args:
        device: to measure.
        clock: returns seconds; processor time is less disturbed by other work than the system's, with one thread.
        folder: of the file; the user's cache folder by default. Nothing is read or kept where ``fresh``.
        fresh: measure everything, and keep nothing.
    """

    computed = False

    def __init__(
        self,
        device: str = "cpu",
        clock: Callable[[], float] = time.perf_counter,
        folder: Path | None = None,
        fresh: bool = False,
    ) -> None:
        self.device, self._clock = torch.device(device), clock
        self._of = {**machine(), "processor": _processor(), "torch": versions()["torch"], "device": str(self.device)}
        self._file = None if fresh else (folder or cache_folder()) / "cost.json"
        self._known: dict[str, float] = {}
        self._since, self._new = time.time(), 0
        self._read()

    @property
    def machine(self) -> str:
        """What was measured, in words."""
        threads = self._of["threads"]
        return f"{self._of['processor']}, {threads} thread{'s' if threads != '1' else ''}, {self.device}"

    def seconds(self, operation: Operation) -> float:
        """Return the seconds that an operation takes, as often as it happens."""
        once = replace(operation, times=1.0)
        limit = LIMITS.get(operation.kind)
        if limit is None or _amount(once) <= limit:
            return self._measured(once) * operation.times
        large = _within(once, limit)
        small = _within(once, limit / 4)
        ratio = _amount(large) / _amount(small)
        exponent = 1.0
        if ratio > 1.5:
            exponent = math.log(self._measured(large) / self._measured(small)) / math.log(ratio)
        exponent = min(max(exponent, LEAST), MOST)
        return self._measured(large) * (_amount(once) / _amount(large)) ** exponent * operation.times

    def slowdown(self) -> float | None:
        """Return how much longer a matrix product and an eigenproblem take at once than each alone."""
        if self.device.type != "cpu" or processors() < 2 or self._clock is not time.perf_counter:
            return None  # two threads take as much processor time at once as in turn
        if BESIDE not in self._known:
            self._known[BESIDE] = min(max(self._slowdown(), 1.0), 2.0)
            self._new += 1
        return self._known[BESIDE]

    def _slowdown(self) -> float:
        runs, solves = (prepared(operation, self.device) for operation in AT_ONCE)
        alone, ended, done = self._time(runs) * self._time(solves), threading.Event(), [0]

        def solve_on() -> None:
            torch.set_num_threads(threads)
            while not ended.is_set():
                solves()
                done[0] += 1

        threads, other = torch.get_num_threads(), threading.Thread(target=solve_on)
        start, count = time.perf_counter(), 0
        other.start()
        while time.perf_counter() - start < LONG_ENOUGH:
            runs()
            count += 1
        runs_alone = time.perf_counter() - start
        ended.set()
        other.join()
        solves_alone = time.perf_counter() - start
        return math.sqrt(runs_alone / count * solves_alone / done[0] / alone)

    def compute_dtype(self, asked: str, model_dtype: str) -> str:
        """Return what blocks compute in here."""
        return str(choose_dtype(asked, getattr(torch, model_dtype), self.device)).removeprefix("torch.")

    def keep(self) -> None:
        """Keep what was measured; a folder that cannot be written is no error, as all can be measured again."""
        if self._file is None or not self._new:
            return
        told = {"of": self._of, "since": self._since, "seconds": self._known}
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            write_whole(self._file, json.dumps(told, indent=1))
        except OSError:
            return
        self._new = 0

    def _read(self) -> None:
        if self._file is None:
            return
        try:
            told = json.loads(self._file.read_text(encoding="utf-8"))
            known = {str(key): float(value) for key, value in told["seconds"].items()}
            fits = told["of"] == self._of and 0 <= self._since - float(told["since"]) < WEEK
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return
        if fits and all(math.isfinite(value) and value >= 0 for value in known.values()):
            self._known, self._since = known, float(told["since"])

    def _measured(self, operation: Operation) -> float:
        key = f"{operation.kind} {operation.sizes} {operation.dtype} {operation.call or ''}"
        if key not in self._known:
            with torch.no_grad():
                self._known[key] = self._time(prepared(operation, self.device))
            self._new += 1
        return self._known[key]

    def _time(self, run: Callable[[], Any]) -> float:
        """Return the median seconds of a few runs after one that warms up, which counts if it is slow."""
        taken = [self._once(run)]
        if taken[0] < SLOWEST:
            taken = [self._once(run)]
            while sum(taken) < ENOUGH or len(taken) < 3:
                taken.append(self._once(run))
        return statistics.median(taken)

    def _once(self, run: Callable[[], Any]) -> float:
        start = self._clock()
        run()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return max(self._clock() - start, 1e-7)


def _amount(operation: Operation) -> float:
    return operation.flops or operation.bytes


def _within(operation: Operation, limit: float) -> Operation:
    """Return the operation with its largest sizes halved until it is no more than a limit."""
    while _amount(operation) > limit and max(operation.sizes) > 1:
        largest = operation.sizes.index(max(operation.sizes))
        sizes = tuple(size // 2 if place == largest else size for place, size in enumerate(operation.sizes))
        operation = replace(operation, sizes=sizes)
    return operation


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
