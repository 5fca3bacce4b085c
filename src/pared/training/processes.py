"""The processes of a training: one, or several that a launcher started, of which the first writes."""

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
        device: where this one trains.

    Raises:
        ParedError: Accelerate is missing, the device is not here or is one by number, or parameters would be in pieces.
    """

    def __init__(self, device: str) -> None:
        if importlib.util.find_spec("accelerate") is None:
            raise ParedError("training needs the package accelerate; install it with: pip install 'pared[train]'")
        if any(os.environ.get(name, "").lower() in ("1", "true") for name in ("ACCELERATE_USE_FSDP",
                                                                             "ACCELERATE_USE_DEEPSPEED")):  # fmt: skip
            raise ParedError("training needs whole weights; FSDP and DeepSpeed hold them in pieces: launch with data "
                             "parallelism (accelerate launch --multi_gpu, or torchrun --nproc-per-node N)")  # fmt: skip
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

    def wait(self) -> None:
        """Go on when all are here."""
        self._state.wait_for_everyone()

    def first(self, act: Callable[[], Result]) -> Result | None:
        """Let the first act while the others wait; None for them."""
        result = act() if self.is_first else None
        self.wait()
        return result
