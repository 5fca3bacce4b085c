"""From a compressed model in memory to a folder."""

from pathlib import Path
from typing import Any

import transformers
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pared.checkpoint.loader import LOADER_NAME, MODULE_TYPES, ParedConfig, make_portable

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


def mark(model: PreTrainedModel) -> None:
    """Make a model whose modules were replaced describe itself, so that plain ``save_pretrained`` is enough."""
    model.config.quantization_config = ParedConfig(modules=module_map(model))
    model.config.auto_map = _auto_map(model)
    make_portable(model)


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, folder: Path) -> None:
    """Write weights, configuration, loader and tokenizer; what ``save_pretrained`` of a loaded model does too."""
    model.save_pretrained(folder, max_shard_size=SHARD_SIZE)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


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
