"""Opening a checkpoint so that its blocks are read when they are needed."""

from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from transformers import PreTrainedModel
from transformers.quantizers.auto import get_hf_quantizer

from pared.checkpoint.streamed import StreamedBlocks
from pared.checkpoint.tensor_places import TensorPlaces
from pared.environment import dtype_of
from pared.errors import ParedError
from pared.models.architecture import architecture, first_line, raised_in
from pared.models.source import ModelSource
from pared.models.stored import StoredTensor, first_floating, stored_tensors, weight_files
from pared.models.trust import trusted
from pared.models.weights import WeightNames
from pared.modules.shared import DOWN
from pared.names import called
from pared.structure.finite import require_finite
from pared.structure.model import find_blocks_path


def open_streamed(
    source: ModelSource,
    dtype: "str | torch.dtype" = "auto",
    folder: Path | None = None,
    blocks_path: str | None = None,
    outside: bool = True,
) -> StreamedBlocks:
    """Open a model so that its blocks are read when they are needed; everything outside of them is read now.

    Every tensor has the bits and dtype that ``source.load()`` gives it. Memory: what is outside of the blocks.

    Args:
        source: a model in safetensors, dense or made by pared.
        dtype: ``auto`` keeps what is stored.
        folder: where changed blocks are written; without one none may be changed.
        blocks_path: name of the list of blocks, where it is not the one that ``find_anatomy`` finds.
        outside: whether what is outside of the blocks is read at all; without it the model cannot be called.

    Raises:
        ParedError: as ``source.load()``; also where weights of blocks are tied to others, or no safetensors are there.
    """
    source.require_files()
    name, location = source.name, source.location
    files = weight_files(location, name)
    stored = stored_tensors(files, name)
    model, quantizer, path = _empty_model(source, dtype, stored, blocks_path)
    _require_untied(model, path, name)
    names = WeightNames(model, model.dtype, quantizer, name)
    places = TensorPlaces(model, path, names, stored, name)
    again = partial(open_streamed, source, dtype, None, blocks_path, outside=False)
    store = StreamedBlocks(model, path, places, folder, name, again if outside else None)
    if not outside:
        return store
    if quantizer is not None:
        quantizer.postprocess_model(model)  # as from_pretrained does; what is not in memory stays packed
    require_finite(model, name)
    return store


def _empty_model(
    source: ModelSource, dtype: "str | torch.dtype", stored: dict[str, StoredTensor], blocks_path: str | None
) -> tuple[PreTrainedModel, Any, str]:
    """Build the model as ``from_pretrained`` does: parameters without values, buffers with theirs.

    Returns:
        The model, what put compressed modules in place, if anything, and the name of its list of blocks.
    """
    config = source.config()
    kind = architecture(config, source.name, source.location)
    quantizer, config, _ = get_hf_quantizer(config, None, None, True, {})
    chosen = dtype_of(dtype) or getattr(config, "dtype", None) or first_floating(stored.values())
    try:
        with init_empty_weights(include_buffers=False):
            model: PreTrainedModel = kind._from_config(config, dtype=chosen)
            path = find_blocks_path(model, blocks_path)  # of packed layers it could not be told
            if quantizer is not None:
                quantizer.preprocess_model(model=model, dtype=chosen, device_map=None, checkpoint_files=[])
    except ParedError:
        raise
    except Exception as error:  # whatever a nonsensical configuration leads to
        raise ParedError(
            f"model {source.name!r}: config.json makes no model ({first_line(error)}, {raised_in(error)})"
        ) from error
    model.config.name_or_path = source.location
    if model.can_generate() and hasattr(model, "adjust_generation_fn"):
        model.adjust_generation_fn(
            None, False, None, source.location, cache_dir=None, force_download=False, proxies=None,
            local_files_only=False, token=None, revision="main", subfolder="", trust_remote_code=trusted(),
        )  # fmt: skip
    return model.eval(), quantizer, path


def _require_untied(model: PreTrainedModel, path: str, name: str) -> None:
    for alias, owner in (getattr(model, "all_tied_weights_keys", None) or {}).items():
        inside = [tensor for tensor in (alias, owner) if tensor.startswith(f"{path}.")]
        if inside and not alias.endswith(DOWN):
            raise ParedError(
                f"model {name!r}: {alias} is tied to {owner}, and a block that shares a weight cannot be read by "
                f"itself; work with the whole model in memory ({called('stream', 'off')})"
            )
