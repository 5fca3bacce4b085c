"""Hidden states of a calibration set: in memory up to a limit, the rest in files beside the output.

Plain reads and writes, no memory maps: mapped pages would count as memory of the process that a limit is to spare.
"""

import contextlib
import errno
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch

from pared.errors import ParedError
from pared.io.leftovers import scratch
from pared.names import called

RESERVE = 32 * 1024 * 1024  # bytes of the disk that are left free


class ActivationMemory:
    """How much memory the hidden states of one run may take together, and the folder where the rest of them lies.

    A context manager: the folder is made when the first tensor does not fit, and is gone at the end.

    Args:
        limit: bytes; None for no limit.
        beside: the output that the folder lies beside; without one it lies in the user's cache folder.

    Attributes:
        limit: bytes; None for no limit.
        used: bytes that are held in memory now.
        spilled: the most bytes that lay on the disk at once.
    """

    def __init__(self, limit: int | None = None, beside: Path | None = None) -> None:
        self.limit, self.used, self.spilled = limit, 0, 0
        self._beside, self._on_disk = beside, 0
        self._folder: Path | None = None
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> "ActivationMemory":
        return self

    def __exit__(self, *_: object) -> None:
        self._folder = None
        self._stack.close()

    @property
    def folder(self) -> Path:
        """The folder of what does not fit in memory; made when it is first asked for.

        Raises:
            ParedError: no folder for it can be made.
        """
        if self._folder is None:
            try:
                self._folder = self._stack.enter_context(scratch(self._beside))
            except OSError as error:
                raise ParedError(
                    f"no folder for activations can be made beside {self._beside} ({error.strerror or error})"
                ) from None
        return self._folder

    def keep(self, tensor: torch.Tensor) -> "_InMemory | _InFile":
        """Take a tensor in, where there is room for it.

        Raises:
            ParedError: it cannot be written, as where the disk is full.
        """
        if self.limit is None or self.used + tensor.nbytes <= self.limit:
            return _InMemory(self, tensor)
        try:
            found = _InFile(self, tensor)
        except OSError as error:
            if error.errno == errno.ENOSPC:
                self._require_free(tensor.nbytes)
            raise ParedError(f"activations cannot be written to {self.folder} ({error.strerror or error})") from None
        return found

    def moved(self, on_disk: int) -> None:
        """Count bytes that came to the disk, or left it."""
        self._on_disk += on_disk
        self.spilled = max(self.spilled, self._on_disk)

    def _require_free(self, needed: int) -> None:
        free = shutil.disk_usage(self.folder).free
        if free < needed + RESERVE:
            raise ParedError(
                f"not enough disk for activations in {self.folder.parent}: {needed + RESERVE:,} bytes needed, {free:,} "
                f"free; allow more memory for them ({called('activation_memory')}), name an output on another disk, or "
                "calibrate on fewer or shorter windows"
            )


class HiddenStates:
    """What a block reads, one tensor ``(windows, tokens, width)`` a batch; a list whose entries may lie on the disk.

    An entry comes back with the bits, dtype, strides and device it was given with. One that lies in memory is the very
    tensor, as in a list; one on the disk is read again each time.

    Args:
        tensors: the first entries.
        memory: what they share with the other hidden states of the run; without a limit if not given.
    """

    def __init__(self, tensors: Iterable[torch.Tensor] = (), memory: ActivationMemory | None = None) -> None:
        self.memory = memory if memory is not None else ActivationMemory()
        self._kept: list[_InMemory | _InFile | None] = []
        for tensor in tensors:
            self.append(tensor)

    def __len__(self) -> int:
        return len(self._kept)

    def __getitem__(self, number: int) -> torch.Tensor:
        kept = self._kept[number]
        if kept is None:
            raise ParedError(f"hidden states of batch {number} were given up and are asked for again")
        return kept.read()

    def __setitem__(self, number: int, tensor: torch.Tensor) -> None:
        self._kept[number] = None  # what goes makes room for what comes
        self._kept[number] = self.memory.keep(tensor)

    def __iter__(self) -> Iterator[torch.Tensor]:
        return (self[number] for number in range(len(self)))

    @property
    def shapes(self) -> list[torch.Size]:
        """The shapes of the entries; none is read."""
        return [kept.shape for kept in self._kept if kept is not None]

    @property
    def nbytes(self) -> int:
        """Bytes of all entries, wherever they lie."""
        return sum(kept.nbytes for kept in self._kept if kept is not None)

    def append(self, tensor: torch.Tensor) -> None:
        """Add a batch."""
        self._kept.append(self.memory.keep(tensor))

    def clone(self) -> "HiddenStates":
        """Return a copy that does not change with this one; what lies on the disk is not copied there."""
        new = HiddenStates(memory=self.memory)
        new._kept = [kept if isinstance(kept, _InFile) or kept is None else self.memory.keep(kept.tensor.clone())
                     for kept in self._kept]  # fmt: skip
        return new

    def part(self, start: int, stop: int) -> "HiddenStates":
        """Return some batches, not copied; what is put in the one list is not seen in the other."""
        new = HiddenStates(memory=self.memory)
        new._kept = self._kept[start:stop]
        return new

    def append_from(self, other: "HiddenStates", number: int) -> None:
        """Add a batch of another list, not copied."""
        self._kept.append(other._kept[number])

    def take(self, other: "HiddenStates") -> None:
        """Hold what another holds from now on, not copied."""
        self._kept = list(other._kept)

    def free(self) -> None:
        """Give every entry up; the list stays as long as it is."""
        self._kept = [None] * len(self._kept)


class _InMemory:
    """A tensor in memory, counted as long as anybody holds it."""

    def __init__(self, memory: ActivationMemory, tensor: torch.Tensor) -> None:
        self.tensor, self.nbytes, self._memory = tensor.detach(), tensor.nbytes, memory
        self.shape = tensor.shape
        memory.used += self.nbytes

    def read(self) -> torch.Tensor:
        return self.tensor

    def __del__(self) -> None:
        if hasattr(self, "_memory"):
            self._memory.used -= self.nbytes


class _InFile:
    """A tensor in a file of its own, which is removed with its last reference."""

    def __init__(self, memory: ActivationMemory, tensor: torch.Tensor) -> None:
        tensor = tensor.detach()
        order = sorted(range(tensor.ndim), key=lambda dim: (-tensor.stride()[dim], dim))
        in_order = tensor.permute(order)
        if not in_order.is_contiguous():  # with holes or overlaps, as of an expanded one: no form to keep
            order, in_order = list(range(tensor.ndim)), tensor.contiguous()
        self._shape, self._back = in_order.shape, sorted(range(len(order)), key=order.__getitem__)
        self._dtype, self._device, self.nbytes = tensor.dtype, tensor.device, tensor.nbytes
        self.shape = tensor.shape
        self._path = memory.folder / f"{uuid.uuid4().hex}.bin"
        raw = in_order.cpu().flatten().view(torch.uint8).numpy()
        try:
            with open(self._path, "wb", buffering=0) as file:
                left = raw.data
                while left:
                    left = left[file.write(left) :]
        except OSError:
            self._path.unlink(missing_ok=True)
            raise
        self._memory = memory
        memory.moved(self.nbytes)

    def read(self) -> torch.Tensor:
        flat = torch.empty(self.nbytes, dtype=torch.uint8)
        left = flat.numpy().data
        try:
            with open(self._path, "rb", buffering=0) as file:
                while left and (count := file.readinto(left)):
                    left = left[count:]
        except OSError as error:
            raise ParedError(f"activations cannot be read from {self._path} ({error.strerror or error})") from None
        if left:
            raise ParedError(f"activations in {self._path} end too early; something else changed the file")
        return flat.view(self._dtype).view(self._shape).permute(self._back).to(self._device)

    def __del__(self) -> None:
        if hasattr(self, "_memory"):
            self._memory.moved(-self.nbytes)
            with contextlib.suppress(OSError):
                os.unlink(self._path)
