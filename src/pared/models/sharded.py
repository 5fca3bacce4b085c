"""Checkpoints of torch.distributed.checkpoint (DCP), in which FSDP and tensor parallelism save a model in shards.

Such a model is put together once, one block at a time, as a folder of safetensors in the user's cache.
"""

import hashlib
import logging
import re
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pared.errors import DamagedError, ParedError
from pared.io.digests import file_digest
from pared.models.architecture import first_line
from pared.models.trust import trusted
from pared.models.twin import made_once, twin_folder, write_safetensors
from pared.names import called

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

PICKLED = ".metadata"  # lists the tensors of shards that DCP writes by itself
OF_TRANSFORMERS = re.compile(r"shard-\d{5}-model-\d{5}-of-\d{5}\.safetensors")
WEIGHTS = re.compile(r"(model|pytorch_model).*\.(safetensors|bin)(\.index\.json)?")
BESIDE = (".json", ".jinja", ".txt", ".model", ".tiktoken", ".py")  # what is read of a model beside its weights
BLOCK = re.compile(r".*?\.\d+\.")


def shards_of(folder: Path) -> Path | None:
    """Return where the shards of a model lie, which it is in if it has no weights in one piece; None without any.

    That is the folder itself, or one in it: accelerate writes ``pytorch_model_fsdp_0``, and the optimizer beside it.
    """
    names = [path.name for path in folder.iterdir()]
    if any(WEIGHTS.fullmatch(name) for name in names):
        return None
    if any(OF_TRANSFORMERS.fullmatch(name) for name in names):
        return folder
    places = (folder, *(path for path in sorted(folder.iterdir()) if not path.name.startswith("optim")))
    return next((place for place in places if (place / PICKLED).is_file()), None)


def joined(folder: Path, place: Path) -> Path:
    """Return the folder of safetensors of a model in shards, made once.

    Args:
        folder: of the model.
        place: of the shards.

    Raises:
        ParedError: they cannot be read, or their list is a pickle and may not be.
    """
    if (place / PICKLED).is_file() and not trusted():
        raise ParedError(
            f"{place}: {PICKLED} of torch.distributed.checkpoint is a pickle, which can run code when it is read; if "
            f"you trust it give {called('trust_remote_code', 'True')}, or make a folder of it where you do: accelerate "
            f"merge-weights {place} DIR"
        )
    files = [path for path in (*sorted(folder.iterdir()), *sorted(place.iterdir())) if path.is_file()]
    digest = hashlib.sha256("\n".join(f"{path.name} {file_digest(path)}" for path in files).encode()).hexdigest()
    twin, size = twin_folder(f"{folder.name}-{digest[:16]}"), sum(path.stat().st_size for path in files)

    def make(staging: Path) -> None:
        log.info("putting the shards of %s together, once: about %s bytes in %s", folder, f"{size:,}", twin)
        with _readable(place):
            write_safetensors(_tensors(place), staging)
        for path in folder.iterdir():
            if path.is_file() and path.suffix in BESIDE:
                shutil.copyfile(path, staging / path.name)

    return made_once(twin, size, make)


@contextmanager
def _readable(place: Path) -> Iterator[None]:
    """Report whatever goes wrong inside as damage of the shards."""
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        yield
    except ParedError:
        raise
    except (Exception, CheckpointException) as error:  # pickle, zipfile, safetensors and torch each raise their own
        failures = getattr(error, "failures", None) or {0: (error, None)}
        why = next(iter(failures.values()))[0]
        raise DamagedError(f"{place}: cannot be read as torch.distributed.checkpoint ({first_line(why)})",
                           "save it again") from error  # fmt: skip


def _tensors(place: Path) -> Iterator[dict[str, "torch.Tensor"]]:
    """Yield the tensors of the model, those of a block together."""
    import torch
    from torch.distributed.checkpoint.state_dict_loader import load

    listed = _reader(place).read_metadata()
    groups: dict[str, dict[str, str]] = {}
    for key, name in _names(listed).items():
        block = BLOCK.match(name)
        groups.setdefault(block.group() if block else name, {})[key] = name
    for group in groups.values():
        entries = {key: listed.state_dict_metadata[key] for key in group}
        tensors = {key: torch.empty(one.size, dtype=one.properties.dtype) for key, one in entries.items()}
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")  # one process is what is wanted
            load(tensors, storage_reader=_reader(place), no_dist=True)
        yield {name: tensors.pop(key) for key, name in group.items()}


def _reader(place: Path) -> Any:
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

    return FileSystemReader(str(place)) if (place / PICKLED).is_file() else HuggingFaceStorageReader(str(place))


def _names(listed: Any) -> dict[str, str]:
    """Return the names in the model of the tensors that a checkpoint lists, by theirs there.

    A model is often saved in a mapping with others, ``{"model": ..., "optimizer": ...}``.
    """
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    paths = {
        key: tuple(map(str, (listed.planner_data or {}).get(key, (key,))))
        for key, entry in listed.state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    if any(path[0] == "model" and len(path) > 1 for path in paths.values()):
        paths = {key: path[1:] for key, path in paths.items() if path[0] == "model"}
    if not paths:
        raise ValueError("it lists no tensors")
    return {key: ".".join(path) for key, path in paths.items()}
