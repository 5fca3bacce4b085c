"""The processes of a training: one, or several that a launcher started, of which the first writes."""

import functools
import importlib.util
import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch

from pared.errors import ParedError
from pared.hardware import device_of

Result = TypeVar("Result")


class Processes:
    """This process among those that train together.

    Args:
        device: where it trains.

    Attributes:
        count: of them.
        is_first: whether this one writes and tells.
        sharded: whether each holds only its part of what trains (FSDP), as ``accelerate launch --use_fsdp`` asks for.
        device: where this one trains.

    Raises:
        ParedError: Accelerate is missing, the device is not here or is one by number, or the launcher asks for
            DeepSpeed or for parameters that wait in the memory of the host.
    """

    def __init__(self, device: str) -> None:
        if importlib.util.find_spec("accelerate") is None:
            raise ParedError("training needs the package accelerate; install it with: pip install 'pared[train]'")
        for name in ("ACCELERATE_USE_DEEPSPEED", "FSDP_OFFLOAD_PARAMS"):
            if _is_set(name):
                raise ParedError(f"training does not know what {name} asks for; launch with FSDP that does not offload "
                                 "(accelerate launch --use_fsdp), or data parallel (--multi_gpu)")  # fmt: skip
        if (number := device_of(device).index) is not None:
            raise ParedError(
                f"device {device!r}: a process takes the device of its own number; choose one by "
                f"CUDA_VISIBLE_DEVICES={number} in the environment, and device cuda"
            )
        from accelerate import PartialState

        # Others wait while the first measures and writes, which may take long.
        self._state: Any = PartialState(cpu=device == "cpu", timeout=timedelta(days=1))
        self.count: int = self._state.num_processes
        self.is_first: bool = self._state.is_main_process
        self.device: torch.device = torch.device(self._state.device)
        self.sharded: bool = _asks_for_shards() and self.count > 1

    def wait(self) -> None:
        """Go on when all are here."""
        self._state.wait_for_everyone()

    def first(self, act: Callable[[], Result]) -> Result | None:
        """Let the first act while the others wait; None for them.

        Raises:
            ParedError: in the others, that the first has failed, and how.
        """
        from accelerate.utils import broadcast_object_list

        result, failure = None, None
        if self.is_first:
            try:
                result = act()
            except Exception as error:
                failure = error
        (told,) = broadcast_object_list([None if failure is None else str(failure)])
        if failure is not None:
            raise failure
        if told is not None:
            raise ParedError(f"the first process failed: {told}")
        return result

    def agreed(self, value: float) -> float:
        """Return the first process's value in all."""
        from accelerate.utils import broadcast

        return float(broadcast(torch.tensor(value, dtype=torch.float64, device=self.device)))


@functools.cache
def _asks_for_shards() -> bool:
    """Whether the launcher of this process asks for FSDP.

    That is kept from Accelerate, which would shard what is in shards already, as is a precision other than that of the
    training.
    """
    asked = _is_set("ACCELERATE_USE_FSDP")
    os.environ.pop("ACCELERATE_USE_FSDP", None)
    os.environ["ACCELERATE_MIXED_PRECISION"] = "no"
    return asked


def _is_set(name: str) -> bool:
    return os.environ.get(name, "").lower() in ("1", "true")
