"""A folder put together from the files of a model's blocks: what is in it is what ``save`` writes, in more files."""

import contextlib
import json
import os
import shutil
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from pared.checkpoint.save import SHARD_SIZE, save_beside
from pared.checkpoint.streamed import StreamedBlocks
from pared.models.source import ModelSource
from pared.models.weights import stored_tensors
from pared.modules.sparse import SparseLinear


def save_streamed(
    store: StreamedBlocks,
    tokenizer: PreTrainedTokenizerBase | None,
    folder: Path,
    source: ModelSource | None = None,
) -> None:
    """Write a model whose blocks lie in files of their own, as ``save`` does of one in memory.

    Every block's file becomes one of the folder's, not copied where both lie on one disk. Blocks that were not changed
    are written first. Memory: one block beside what is outside of the blocks.

    Args:
        store: of the model, which is marked; no block is loaded.
        tokenizer: of the model.
        folder: where; on the disk of the store's folder.
        source: what it was made from, whose files for images and dialogues are copied.

    Raises:
        ParedError: a block cannot be read or written.
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
        store.relocate(index, _linked(store.files[index], shard))
    _write_index(store, folder, shards)
    save_beside(tokenizer, folder, source)


def _linked(file: Path | None, shard: Path) -> Path:
    """Have a file under a second name, or if there can be none, under that alone; return where it is read."""
    assert file is not None
    with contextlib.suppress(OSError):
        os.link(file, shard)
        return file
    shutil.move(file, shard)
    return shard


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
