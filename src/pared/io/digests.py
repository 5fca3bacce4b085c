"""Digests that distinguish files, model folders and models in memory: SHA-256 over all of their bytes.

The digest of a file is kept in the user's cache folder under its device, inode, size and times, so that a model is read
once and not once a command; a change of the file changes one of them. What may have changed within the resolution of
a clock is not kept, and what is kept and not readable is ignored.
"""

import hashlib
import json
import os
import re
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from pared.errors import ParedError
from pared.io.files import cache_folder, files_under, path_of, write_whole
from pared.io.guarded import read_json

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

BLOCK = 1 << 20  # bytes read at once
SETTLED_NS = 2_000_000_000  # a file that changed less than this ago may change again within one tick of its clock
KEPT = 20_000  # digests; the oldest go

# What transformers, tokenizers and PEFT read of a folder: weights, their index, configurations, code, vocabularies.
READ = frozenset(
    {".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".npz", ".json", ".yaml", ".py"}
    | {".jinja", ".model", ".txt", ".tiktoken", ".bpe", ".spm"}
)
# What they never read, despite similar names: what a trainer keeps to resume, and what pared writes about a folder.
NEVER_READ = re.compile(
    r"pared\.json|went\.json|(README|LICENSE)(\.(md|txt|rst|json))?|requirements.*\.txt|trainer_state\.json"
    r"|training_args\.bin|(optimizer|scheduler).*\.(pt|bin)|scaler\.pt|rng_state.*\.pth"
    r"|(all|train|eval|test|predict)_results\.json"
)


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file's bytes, read now.

    Raises:
        OSError: it cannot be read.
    """
    digest, block = hashlib.sha256(), memoryview(bytearray(BLOCK))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(block):
            digest.update(block[:count])
    return digest.hexdigest()


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file's bytes, read only if the file is not known from before.

    Raises:
        OSError: it cannot be read.
    """
    begun, before = time.time_ns(), path.stat()
    kept = _place(before)
    if (known := _recall(kept, before)) is not None:
        return known
    found = sha256_of(path)
    after = path.stat()
    settled = begun - max(before.st_mtime_ns, before.st_ctime_ns) > SETTLED_NS
    if settled and _key(after) == _key(before):
        with suppress(OSError):  # a cache that cannot be written is no reason to stop
            kept.parent.mkdir(parents=True, exist_ok=True)
            write_whole(kept, json.dumps({"key": _key(before), "sha256": found, "check": _check(before, found)}))
            _thin_out(kept.parent)
    return found


def folder_digest(folder: Path) -> str:
    """Return a digest of a model folder: of the names and bytes of all files that loading it may read.

    Weights of every format, adapters, configurations, tokenizer and code count; where the folder lies, notes, and what
    a trainer keeps do not. The base model that an adapter names counts if it is a folder with a model.

    Raises:
        OSError: a file cannot be read.
    """
    digest = _files_digest(folder)
    if (base := _adapted(folder)) is not None:
        digest.update(f"base model\0{_files_digest(base).hexdigest()}\n".encode())
    return digest.hexdigest()


def _files_digest(folder: Path) -> "hashlib._Hash":
    digest, files = hashlib.sha256(), dict(sorted(_read_files(folder)))
    with ThreadPoolExecutor() as pool:  # hashlib and the disk work outside of Python's lock
        for name, found in zip(files, pool.map(file_digest, files.values()), strict=True):
            digest.update(f"{name}\0{found}\n".encode("utf-8", "surrogateescape"))
    return digest


def model_digest(model: "PreTrainedModel", tensors: "Iterable[tuple[str, torch.Tensor]] | None" = None) -> str:
    """Return the SHA-256 of a model: configuration, and every tensor's name, shape, dtype and bytes.

    Args:
        model: whose configuration it is.
        tensors: of its state by name, in the order of the names; those in memory if not given.
    """
    import torch

    told = json.loads(model.config.to_json_string(use_diff=False))
    for incidental in ("_name_or_path", "transformers_version", "_commit_hash", "auto_map"):
        told.pop(incidental, None)
    digest = hashlib.sha256(json.dumps(told, sort_keys=True).encode())
    for name, tensor in sorted(model.state_dict().items()) if tensors is None else tensors:
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _read_files(folder: Path) -> Iterator[tuple[str, Path]]:
    """Yield the name under a folder and the path of every file that counts; a folder inside with a model does not."""

    def is_part(inner: Path) -> bool:
        return not inner.name.startswith(".") and inner.name != "__pycache__" and not _is_model(inner)

    for name in files_under(folder, is_part):
        path = folder / name
        if path.name.startswith(".") or NEVER_READ.fullmatch(path.name):
            continue
        if path.suffix.lower() in READ:
            yield name, path


def _adapted(folder: Path) -> Path | None:
    """Return the folder of the model that an adapter in a folder is for, which is no adapter itself."""
    try:
        base = path_of(read_json(folder / "adapter_config.json", "adapter", unique=False)["base_model_name_or_path"])
    except (ParedError, KeyError, TypeError):
        return None
    return base if _is_model(base) and base.resolve() != folder.resolve() else None


def _is_model(folder: Path) -> bool:
    return os.path.isfile(folder / "config.json")


def _key(stat: os.stat_result) -> list[int]:
    return [stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]


def _check(stat: os.stat_result, digest: str) -> str:
    return hashlib.sha256(f"{_key(stat)} {digest}".encode()).hexdigest()[:16]


def _place(stat: os.stat_result) -> Path:
    """Return where the digest of a file is kept: one file each, so that processes need not wait for one another."""
    name = hashlib.sha256(json.dumps(_key(stat)).encode()).hexdigest()[:32]
    return cache_folder() / "digests" / f"{name}.json"


def _recall(kept: Path, stat: os.stat_result) -> str | None:
    try:
        found = json.loads(kept.read_text(encoding="utf-8"))
        digest = str(found["sha256"])
        whole = found["key"] == _key(stat) and found["check"] == _check(stat, digest)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return digest if whole else None


def _thin_out(folder: Path) -> None:
    """Remove the older half once there are too many."""
    kept = list(folder.iterdir())
    if len(kept) > KEPT:
        for path in sorted(kept, key=lambda one: one.stat().st_mtime_ns)[: len(kept) // 2]:
            path.unlink(missing_ok=True)
