"""When what is done with a block is done: before the next one runs, or beside it."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from types import TracebackType

import torch

Task = Callable[[], None]
Turn = Callable[[Task], None]


def in_turn(task: Task) -> None:
    """Do a task now."""
    task()


class Beside(AbstractContextManager["Beside"]):
    """Does every task in a thread of its own, one at a time and in order, while the caller goes on. A context manager.

    A task begins when the one before has ended, which the caller waits for: there is one under way at most. It
    computes with as many threads as the caller does, so that what comes of it is the same, bit for bit.

    Args:
        waiting: what the caller waits in, to tell the time.

    Raises:
        Exception: what a task raised, where the caller waits for it next, or at the end.
    """

    def __init__(self, waiting: Callable[[], AbstractContextManager[None]]) -> None:
        self._waiting = waiting
        self._under_way: Future[None] | None = None

    def __enter__(self) -> "Beside":
        self._thread = ThreadPoolExecutor(1, "beside", torch.set_num_threads, (torch.get_num_threads(),))
        return self

    def __call__(self, task: Task) -> None:
        """Wait for the task that is under way, and begin this one."""
        self._wait()
        self._under_way = self._thread.submit(_with_gradients, torch.is_grad_enabled(), task)

    def __exit__(self, kind: type[BaseException] | None, *_: BaseException | TracebackType | None) -> None:
        """Wait for the last task, and raise what it raised, which in turn would have come before the caller's error."""
        try:
            if kind is None or issubclass(kind, Exception):
                self._wait()
        finally:
            self._thread.shutdown(cancel_futures=True)

    def _wait(self) -> None:
        if self._under_way is not None:
            with self._waiting():
                under_way, self._under_way = self._under_way, None
                under_way.result()


def _with_gradients(enabled: bool, task: Task) -> None:
    """Do a task as the thread would that it comes from: whether torch records gradients is a thread's own."""
    with torch.set_grad_enabled(enabled):
        task()
