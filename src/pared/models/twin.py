"""Checkpoints of other forms as folders of safetensors, made once and kept in the user's cache."""

import json
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from pared.errors import ParedError
from pared.io.files import cache_folder
from pared.io.lock import locked_folder
from pared.io.output_dir import staged
from pared.memory import give_back

if TYPE_CHECKING:
    import torch

SHARD = 256 * 2**20  # bytes after which a file is written


def twin_folder(name: str) -> Path:
    """Return where the twin of a checkpoint lies, or would."""
    return cache_folder() / "models" / name


def made_once(place: Path, needed: int, make: Callable[[Path], None]) -> Path:
    """Return a folder of the cache, after making it if it is not there.

    It is made beside its place, so a killed process leaves nothing that could be taken for a model. Of several
    processes that need it (ranks, workers of a search) one makes it, and the others wait.

    Args:
        place: of the folder.
        needed: bytes that the disk must have free.
        make: writes it to the folder that it is given.

    Raises:
        ParedError: what ``make`` raises; or the cache cannot be written.
    """
    if place.is_dir():
        return place
    with ExitStack() as stack:
        with suppress(OSError):  # a place that cannot be written is reported by what writes there
            place.parent.mkdir(parents=True, exist_ok=True)
            stack.enter_context(locked_folder(place.parent, wait=True))
        if place.is_dir():
            return place
        try:
            with staged(place, needed=needed) as staging:
                make(staging)
        except ParedError:
            if not place.is_dir():  # else another machine made the same thing first
                raise
    return place


def write_safetensors(groups: Iterable[Mapping[str, "torch.Tensor"]], folder: Path) -> None:
    """Write tensors as they come into files of a folder, with the index that transformers reads.

    Memory: at most :data:`SHARD` bytes beside a group.

    Args:
        groups: tensors by name; a group is given up before the next one is taken.
        folder: where.

    Raises:
        OSError: a file cannot be written.
    """
    from safetensors.torch import save_file
    from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

    waiting: dict[str, torch.Tensor] = {}
    written: list[tuple[Path, tuple[str, ...]]] = []
    size = 0

    def write() -> None:
        file = folder / f"{len(written)}.safetensors"
        save_file(waiting, file, metadata={"format": "pt"})
        written.append((file, tuple(waiting)))
        waiting.clear()
        give_back()

    for group in groups:
        for name, tensor in group.items():
            waiting[name] = tensor.contiguous()
            size += tensor.nbytes
        del group, tensor
        if sum(one.nbytes for one in waiting.values()) >= SHARD:
            write()
    if waiting:
        write()
    weight_map: dict[str, str] = {}
    for number, (file, names) in enumerate(written, 1):
        shard = f"model-{number:05d}-of-{len(written):05d}.safetensors"
        file.rename(folder / shard)
        weight_map |= dict.fromkeys(names, shard)
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (folder / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
