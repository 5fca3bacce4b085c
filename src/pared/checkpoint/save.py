"""From a compressed model in memory to a folder."""

import shutil
from pathlib import Path
from typing import Any

import transformers
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pared.checkpoint.loader import DOWN, LOADER_NAME, MODULE_TYPES, ParedConfig, make_portable, tie
from pared.errors import ParedError
from pared.modules import BasisHolder
from pared.sources.models import ModelSource

AUTO_CLASSES = (
    "AutoModel",
    "AutoModelForCausalLM",
    "AutoModelForMaskedLM",
    "AutoModelForSequenceClassification",
    "AutoModelForTokenClassification",
    "AutoModelForQuestionAnswering",
    "AutoModelForSeq2SeqLM",
    "AutoModelForImageTextToText",
)
SHARD_SIZE = "5GB"


def module_map(model: nn.Module) -> dict[str, dict[str, Any]]:
    """Return the entry of every module that stands where a linear layer stood, from the modules themselves."""
    entries: dict[str, dict[str, Any]] = {}
    for name, module in model.named_modules():
        for kind, (cls, _) in MODULE_TYPES.items():
            if isinstance(module, cls):
                entries[name] = {"kind": kind, **module.entry()}
    return entries


def shared_tensors(model: nn.Module) -> dict[str, str]:
    """Return, for every ``down`` whose weight is that of a module before it, the name of that one's.

    Raises:
        ParedError: one module stands in two places; on loading, one of them would be filled with random numbers.
    """
    shared: dict[str, str] = {}
    weights: dict[int, str] = {}
    modules: dict[int, str] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if not isinstance(module, BasisHolder) or module.down is None:
            continue
        first = modules.setdefault(id(module.down), name)
        if first != name:
            raise ParedError(
                f"{name} and {first} have one module between them, expected one of its own each; "
                "tie their `down.weight` instead"
            )
        owner = weights.setdefault(id(module.down.weight), name)
        if owner != name:
            shared[name + DOWN] = owner + DOWN
    return shared


def mark(model: PreTrainedModel) -> None:
    """Make a model whose modules were replaced describe itself, so that plain ``save_pretrained`` is enough.

    Raises:
        ParedError: one module stands in two places.
    """
    shared = shared_tensors(model)
    model.config.quantization_config = ParedConfig(modules=module_map(model), shared=shared)
    tie(model, shared)
    model.config.auto_map = _auto_map(model)
    make_portable(model)


def save(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    folder: Path,
    source: ModelSource | None = None,
) -> None:
    """Write weights, configuration, loader and tokenizer; what ``save_pretrained`` of a loaded model does too.

    Args:
        model: marked.
        tokenizer: of it.
        folder: where.
        source: what it was made from, whose files for images and dialogues are copied.
    """
    model.save_pretrained(folder, max_shard_size=SHARD_SIZE)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    for file in source.processor_files() if source is not None else ():
        if not (folder / file.name).exists():
            shutil.copyfile(file, folder / file.name)


def _auto_map(model: PreTrainedModel) -> dict[str, str]:
    """Name the loader's class for every Auto class that would load this architecture or its base."""
    found: dict[str, str] = {}
    for auto in AUTO_CLASSES:
        mapping = getattr(transformers, auto)._model_mapping
        listed = mapping.get(type(model.config), ())
        classes = listed if isinstance(listed, (list, tuple)) else (listed,)
        names = {cls.__name__ for cls in classes}
        if type(model).__name__ in names:
            found[auto] = f"{LOADER_NAME}.{type(model).__name__}"
        elif auto == "AutoModel" and names:
            found[auto] = f"{LOADER_NAME}.{sorted(names)[0]}"
    return found
