"""A folder put together from the files of a model's blocks: what is in it is what ``save`` writes, in more files."""

import json
import os
import shutil
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from pared.checkpoint.save import SHARD_SIZE, save_beside
from pared.checkpoint.streamed import StreamedBlocks
from pared.errors import ParedError
from pared.models.source import ModelSource
from pared.models.stored import stored_tensors
from pared.modules.sparse import SparseLinear


def save_streamed(
    store: StreamedBlocks,
    tokenizer: PreTrainedTokenizerBase | None,
    folder: Path,
    source: ModelSource | None = None,
    link: bool = False,
) -> None:
    """Write a model whose blocks lie in files of their own, as ``save`` does of one in memory.

    Every block's file becomes one of the folder's, and stays where it is too. Blocks that were not changed are written
    first. Memory: one block beside what is outside of the blocks.

    Args:
        store: of the model, which is marked; no block is loaded.
        tokenizer: of the model.
        folder: where.
        source: what it was made from, whose files for images and dialogues are copied.
        link: whether a file may be the store's and the folder's at once, as it may where the store's go afterwards; it
            is copied otherwise, and where there can be no links.

    Raises:
        ParedError: a block cannot be read or written, or the disk has no room for a copy.
        OSError: a file cannot be written.
    """
    for index in range(len(store)):
        if store.files[index] is None:
            store.load(index)
            store.commit(index)
    store.model.save_pretrained(folder, state_dict=store.outside_state(), max_shard_size=SHARD_SIZE)
    (folder / SAFE_WEIGHTS_INDEX_NAME).unlink(missing_ok=True)
    outside = sorted(folder.glob("*.safetensors"))
    count = len(outside) + len(store)
    shards = [folder / f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]
    for file, shard in zip(reversed(outside), reversed(shards[: len(outside)]), strict=True):
        file.rename(shard)  # from the last on: none of the new names is an old one that is still to go
    for index, shard in enumerate(shards[len(outside) :]):
        _place(store.files[index], shard, link)
    _write_index(store, folder, shards)
    save_beside(tokenizer, folder, source)


def _place(file: Path | None, shard: Path, link: bool) -> None:
    """Have a file under a second name, and leave it where it is: it may be needed until the folder is in its place."""
    assert file is not None
    if link:
        try:
            os.link(file, shard)
        except OSError:  # on another disk, or on one without links
            pass
        else:
            return
    needed, free = file.stat().st_size, shutil.disk_usage(shard.parent).free
    if free < needed:
        raise ParedError(
            f"not enough disk for a copy of {file.name} in {shard.parent.parent}: {needed:,} bytes needed, {free:,} "
            "free; what was compressed is as it was: make room"
        )
    shutil.copyfile(file, shard)


def _write_index(store: StreamedBlocks, folder: Path, shards: list[Path]) -> None:
    found = stored_tensors(shards, str(folder))
    index = {
        "metadata": {
            "total_parameters": _parameters(store.model),
            "total_size": sum(tensor.nbytes for tensor in found.values()),
        },
        "weight_map": {key: tensor.file.name for key, tensor in found.items()},
    }
    text = json.dumps(index, indent=2, sort_keys=True) + "\n"
    (folder / SAFE_WEIGHTS_INDEX_NAME).write_text(text, encoding="utf-8")


def _parameters(model: PreTrainedModel) -> int:
    """Count parameters as they are in memory, where sparse layers are dense."""
    sparse = [module for module in model.modules() if isinstance(module, SparseLinear) and module.packed]
    unpacked = sum(module.out_features * module.in_features - module.stored for module in sparse)
    return int(model.num_parameters()) + unpacked
