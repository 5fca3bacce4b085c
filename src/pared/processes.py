"""The processes of one job: one, or several that a launcher started, of which the first writes and reports.

``torchrun`` and ``accelerate launch`` start them, on any number of machines. What one process finds out is passed to
the others here; how a job divides its work is its own.
"""

import functools
import io
import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from pared.environment import device_of
from pared.errors import ParedError

if TYPE_CHECKING:  # whether there are others is known without it
    import torch

Item = TypeVar("Item")
Result = TypeVar("Result")

# Others wait while the first measures and writes, which may take long. A process that ends is noticed at once, by its
# closed connections and by the launcher: this is for machines that vanish without a word.
PATIENCE = timedelta(days=1)
REACHED = timedelta(seconds=5)  # how long the launcher's store may take to answer


class OtherProcessError(ParedError):
    """Another process of the job has failed or ended; its error is reported by that one."""


class Processes:
    """This process among those of a job.

    Args:
        rank: of this one, from 0.
        count: of all.
        device: where it computes; the CPU if none is given.

    Attributes:
        rank: of this one.
        count: of all.
        is_first: whether this one writes and tells.
        device: where it computes.
    """

    def __init__(self, rank: int = 0, count: int = 1, device: "torch.device | None" = None) -> None:
        self.rank, self.count, self.is_first = rank, count, rank == 0
        self._device = device

    @property
    def device(self) -> "torch.device":
        """Where this process computes."""
        return self._device or device_of("cpu")

    def wait(self) -> None:
        """Go on when all are here.

        Raises:
            OtherProcessError: one never will be.
        """
        self.gather(None)

    def led(self, act: Callable[[Callable[[Any], None]], Result], follow: Callable[[Any], None]) -> Result:
        """Let the first act, and the others follow the orders that it gives; all get what it returns.

        Args:
            act: is given what sends an order to the others.
            follow: is given every order, in the others.

        Raises:
            OtherProcessError: in the others, that the first has failed, and how.
        """
        if self.count == 1:
            return act(lambda _: None)
        if not self.is_first:
            while True:
                what, value = self.broadcast(None)
                if what == "failed":
                    raise OtherProcessError(f"the first process failed: {value}")
                if what == "done":
                    return value
                follow(value)
        try:
            result = act(lambda order: self.broadcast(("order", order)))
        except OtherProcessError:
            raise
        except Exception as error:
            speaks()  # before others hear of it
            self.broadcast(("failed", str(error)))
            raise
        self.broadcast(("done", result))
        return result

    def first(self, act: Callable[[], Result]) -> Result:
        """Let the first act while the others wait; all get what it returns.

        Raises:
            OtherProcessError: in the others, that the first has failed, and how.
        """
        return self.led(lambda _: act(), lambda _: None)

    def agreed(self, value: Item) -> Item:
        """Return the first process's value in all."""
        return self.broadcast(value)

    def part(self, items: int, unit: int = 1) -> range:
        """Return which of so many items are this process's: neighbours, as many as the others' or ``unit`` more.

        Args:
            items: how many there are; the first processes have one where they are fewer than processes.
            unit: so many that are next to each other stay together.
        """
        units = -(-items // unit)
        start, stop = (-(-units * rank // self.count) for rank in (self.rank, self.rank + 1))
        return range(min(start * unit, items), min(stop * unit, items))

    def each(
        self, work: Sequence[Item], do: Callable[[Item], Result], owner: Callable[[Item], int] | None = None
    ) -> Iterator[Result]:
        """Do something for every item, each in one process, and yield all results in order, the same in all processes.

        Args:
            work: the same in all processes.
            do: for an item; what it returns can be pickled. With one process it is called as results are asked for.
            owner: says whose an item is; item k is that of process k mod ``count`` by default.

        Raises:
            OtherProcessError: another process has failed.
        """
        if self.count == 1:
            yield from map(do, work)
            return
        owners = [number % self.count if owner is None else owner(item) for number, item in enumerate(work)]
        own = [do(item) for item, rank in zip(work, owners, strict=True) if rank == self.rank]
        found = [iter(results) for results in self.gather(own)] if work else []
        for rank in owners:
            yield next(found[rank])

    def gather(self, value: Item) -> list[Item]:
        """Return what every process gave, in the order of their ranks; its own unchanged.

        Raises:
            OtherProcessError: another process has failed.
        """
        if self.count == 1:
            return [value]
        from torch import distributed

        packed: list[Any] = [None] * self.count
        with together():
            distributed.all_gather_object(packed, _packed(value))
        return [value if rank == self.rank else self._unpacked(one) for rank, one in enumerate(packed)]

    def to_first(self, value: Item) -> list[Item]:
        """Return what every other process gave, in the first one; nothing in those.

        Raises:
            OtherProcessError: another process has failed.
        """
        if self.count == 1:
            return []
        from torch import distributed

        packed: list[Any] | None = [None] * self.count if self.is_first else None
        with together():
            distributed.gather_object(None if self.is_first else _packed(value), packed)
        return [self._unpacked(one) for one in (packed or [])[1:]]

    def broadcast(self, value: Any, source: int = 0) -> Any:
        """Return in all processes the value of one.

        Raises:
            OtherProcessError: another process has failed.
        """
        if self.count == 1:
            return value
        from torch import distributed

        packed = [_packed(value) if self.rank == source else None]
        with together():
            distributed.broadcast_object_list(packed, source)
        return value if self.rank == source else self._unpacked(packed[0])

    def _unpacked(self, packed: Any) -> Any:
        """Return what another process has sent, with tensors of its GPU on that of this one."""
        import torch

        def place(storage: Any, location: str) -> Any:
            return storage if location == "cpu" else storage.to(device=self.device)

        return torch.load(io.BytesIO(packed), map_location=place, weights_only=False)  # from ourselves


ALONE = Processes()


def _packed(value: object) -> bytes:
    import torch

    stream = io.BytesIO()
    torch.save(value, stream)
    return stream.getvalue()


@contextmanager
def together() -> Iterator[None]:
    """Do something that all processes do at the same time.

    Raises:
        OtherProcessError: another process has ended.
    """
    try:
        yield
    except RuntimeError as error:  # torch's errors of distributed are some
        raise OtherProcessError(
            "another process of this job has ended; what it printed says why (nothing, if it was killed or ran out of "
            f"memory): {_line(error)}"
        ) from error


def launched_count() -> int:
    """Return how many processes a launcher says that there are, 1 without one."""
    count = os.environ.get("WORLD_SIZE", "1")
    return int(count) if count.isdigit() and "RANK" in os.environ else 1


@contextmanager
def launched(device: str) -> Iterator[Processes]:
    """Give the processes that a launcher started for this job, this one among them; :data:`ALONE` without a launcher.

    Args:
        device: where each is to compute: ``auto``, ``cpu``, or ``cuda``, of which each takes the one of its own number
            on its machine.

    Raises:
        ParedError: the device is not here or is one by number, or the others cannot be reached.
    """
    count = launched_count()
    if count == 1:
        yield Processes(device=device_of(device))
        return
    import torch
    from torch import distributed

    if ":" in device:
        raise ParedError(
            f"device {device!r}: a process takes the device of its own number; choose some by CUDA_VISIBLE_DEVICES in "
            "the environment, and device cuda"
        )
    where = device_of(device)
    if where.type == "cuda":
        torch.cuda.set_device(where)
    rank, ours = int(os.environ["RANK"]), not distributed.is_initialized()
    if rank:
        logging.getLogger("pared").setLevel(logging.ERROR)  # the first one tells
    store = _join(count, where) if ours else None
    failed = False
    try:
        yield Processes(distributed.get_rank(), distributed.get_world_size(), where)
        if ours:
            with together():
                distributed.barrier()
    except BaseException:
        failed = True
        speaks()  # before others notice closed connections
        raise
    finally:
        if ours:
            distributed.destroy_process_group()
        # The store of torchrun outlives this process, and its agent would interrupt it while it waits.
        if failed and store is not None and rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
            _await_others(store, count)


def _join(count: int, where: "torch.device") -> Any:
    """Let this process be one of the job's, and return the store that they share; that of the first lives as long.

    Raises:
        ParedError: the others cannot be reached.
    """
    from torch import distributed
    from torch.distributed.rendezvous import rendezvous

    backend = "cpu:gloo,cuda:nccl" if where.type == "cuda" else "gloo"
    try:
        store, rank, size = next(rendezvous("env://", timeout=PATIENCE))
        distributed.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=PATIENCE)
    except (RuntimeError, ValueError) as error:
        raise ParedError(
            f"the {count} processes of this job cannot reach each other: {_line(error)}; start "
            "them with torchrun or accelerate launch"
        ) from error
    return store


def _await_others(store: Any, count: int) -> None:
    """Wait until all of a number of processes have failed, but not long: those that are slow ask this one's store."""
    until = time.monotonic() + REACHED.total_seconds()
    with suppress(RuntimeError):
        while store.add(_failures(), 0) < count and time.monotonic() < until:
            time.sleep(0.05)


def _failures() -> str:
    """Return the name under which the store of this job counts the processes that failed."""
    job = os.environ.get("TORCHELASTIC_RUN_ID", ""), os.environ.get("TORCHELASTIC_RESTART_COUNT", "")
    return "/".join(("pared", *job, "failed"))


def is_told_here() -> bool:
    """Whether this process is the one that tells what befell all, as an interruption does."""
    return launched_count() == 1 or os.environ["RANK"] == "0"


@functools.cache
def speaks() -> bool:
    """Whether this process is to tell of a failure: the first that asks, of all that a launcher started.

    All of them may fail alike, or one by one after the first; a user reads one error.
    """
    if launched_count() == 1:
        return True
    from torch.distributed import TCPStore  # type: ignore[attr-defined]  # of the C part

    try:
        store = TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False, timeout=REACHED)
        return bool(store.add(_failures(), 1) == 1)
    except (KeyError, RuntimeError, ValueError):
        return True  # the store is gone with the process that held it: told twice is better than not at all


def _line(error: Exception) -> str:
    """Return the first line of an error, which may be a page."""
    return str(error).partition("\n")[0][:200]
