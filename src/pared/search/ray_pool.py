"""Candidates measured on a Ray cluster: the same search and the same journal as on one machine."""

import io
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from pared.errors import ParedError
from pared.names import called
from pared.search.evolution import Candidate, Measured
from pared.search.pool import Measures, Queue, Task


def on_ray(address: str) -> Any:
    """Return what makes a pool of Ray actors, for ``pools`` of :func:`pared.entrypoints.search.run`.

    Args:
        address: of a cluster, as ``ray.init`` has it; ``auto`` finds a running one, ``local`` starts one here.

    Raises:
        ParedError: ray is not installed.
    """
    _ray()

    @contextmanager
    def pools(measures: Measures, workers: int) -> Iterator[RayPool]:
        with RayPool(measures, workers, address) as pool:
            yield pool

    return pools


class RayPool:
    """Measures in Ray actors of one CPU each; one that dies is replaced, and its candidate measured again.

    What measures is put into the object store once. Every machine of the cluster needs the same version of pared. A
    context manager. Satisfies :class:`pared.search.evolution.Pool`.

    Attributes:
        actors: the actors' handles.
    """

    def __init__(self, measures: Measures, workers: int, address: str) -> None:
        """Connect, and start the actors.

        Args:
            measures: what every actor is given a copy of.
            workers: how many actors.
            address: as in :func:`on_ray`.

        Raises:
            ParedError: there is no such cluster, or actors cannot start there.
        """
        self._ray = ray = _ray()
        self._own = not ray.is_initialized()
        try:
            if self._own:
                place = {"num_cpus": workers} if address == "local" else {"address": address}
                ray.init(**place, include_dashboard=False, logging_level=logging.ERROR, log_to_driver=False)
        except Exception as error:  # ray raises many kinds
            raise ParedError(f"Ray cluster {address!r}: {_line(error)}; start one with: ray start --head") from None
        buffer = io.BytesIO()
        torch.save(measures, buffer)
        self._data = ray.put(buffer.getvalue())
        self._kind = ray.remote(num_cpus=1, max_restarts=0)(_Actor)
        self._queue, self._running = Queue(), dict[Any, tuple[int, Task]]()
        self.actors = [self._kind.remote(self._data) for _ in range(workers)]
        try:
            ray.get([actor.pid.remote() for actor in self.actors])
        except Exception as error:
            self.__exit__()
            raise ParedError(f"Ray cluster {address!r}: a worker cannot start ({_line(error)})") from None

    def __enter__(self) -> "RayPool":
        return self

    def __exit__(self, *_: object) -> None:
        for actor in self.actors:
            self._ray.kill(actor)
        if self._own:
            self._ray.shutdown()

    def submit(self, candidate: Candidate, final: bool = False) -> None:
        """Give a candidate to an actor that is free, or put it in line."""
        self._queue.waiting.append((candidate, final))
        self._dispatch()

    def next(self) -> tuple[int, Measured]:
        """Wait for any candidate.

        Raises:
            ParedError: an actor could not measure; says why.
        """
        while True:
            self._dispatch()
            ready = self._ray.wait(list(self._running), num_returns=1)[0][0]
            place, task = self._running.pop(ready)
            try:
                found = self._ray.get(ready)
            except self._ray.exceptions.RayError:
                self.actors[place] = self._kind.remote(self._data)
                given_up = self._queue.died(task)
                if given_up is not None:
                    return given_up
            else:
                return self._queue.took(task, found)

    def _dispatch(self) -> None:
        busy = {place for place, _ in self._running.values()}
        for place, actor in enumerate(self.actors):
            if place not in busy and self._queue.waiting:
                task = self._queue.waiting.popleft()
                self._running[actor.measure.remote(*task)] = (place, task)


class _Actor:
    """One worker."""

    def __init__(self, data: bytes) -> None:
        torch.set_num_threads(1)
        self._measures = torch.load(io.BytesIO(data), weights_only=False)

    def pid(self) -> int:
        """Return the process id."""
        import os

        return os.getpid()

    def measure(self, candidate: Candidate, final: bool) -> Measured | str:
        """Measure a candidate, or say why it cannot be."""
        try:
            found: Measured = (self._measures.final if final else self._measures)(candidate)
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        return found


def _ray() -> Any:
    try:
        import ray
        import ray.exceptions
    except ImportError:
        raise ParedError(f"{called('ray')} measures on a Ray cluster and needs ray; install it with: pip install ray, "
                         f"or use {called('workers')} on one machine") from None  # fmt: skip
    return ray


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
