"""From a compressed model in memory to a folder."""

import shutil
import sys
from pathlib import Path

import transformers
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pared.checkpoint.format import LOADER_NAME, ParedConfig
from pared.checkpoint.loader import tie
from pared.checkpoint.plain import make_plain, plain_sizes
from pared.checkpoint.portable import has_importable_code, module_map, own_class, with_remote_code
from pared.errors import ParedError
from pared.models.architecture import AUTO_CLASSES
from pared.models.resized import set_sizes
from pared.models.source import ModelSource
from pared.modules import BasisHolder, bits_of
from pared.modules.narrow import counts_of
from pared.modules.opened import experts_map
from pared.modules.shared import DOWN

SHARD_SIZE = "5GB"


def shared_tensors(model: nn.Module) -> dict[str, str]:
    """Return, for every ``down`` whose weight is that of a module before it, the name of that one's.

    Raises:
        ParedError: one module stands in two places; on loading, one of them would be filled with random numbers.
    """
    shared: dict[str, str] = {}
    weights: dict[int, str] = {}
    modules: dict[int, str] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if not isinstance(module, BasisHolder) or module.down is None or bits_of(module):
            continue  # of factors in few bits the weight is made anew whenever it is asked for, and never shared
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

    One whose layers only lost channels, as many in every block, is a plain model of smaller sizes: its configuration
    says so, and nothing of pared is needed to load it.

    Raises:
        ParedError: one module stands in two places.
    """
    if sizes := plain_sizes(model):
        set_sizes(model.config, sizes)
        make_plain(model)
        return
    shared = shared_tensors(model)
    heads = counts_of(model)
    model.config.quantization_config = ParedConfig(
        modules=module_map(model), shared=shared, heads=heads, experts=experts_map(model)
    )
    tie(model, shared)
    model.config.auto_map = _auto_map(model)
    with_remote_code(model)


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
    save_beside(tokenizer, folder, source)


def save_beside(tokenizer: PreTrainedTokenizerBase | None, folder: Path, source: ModelSource | None) -> None:
    """Write what lies beside a model's weights: its tokenizer, and the files for images and dialogues of its source."""
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    for file in source.processor_files() if source is not None else ():
        if not (folder / file.name).exists():
            shutil.copyfile(file, folder / file.name)


def _auto_map(model: PreTrainedModel) -> dict[str, str]:
    """Name the loader's class for every Auto class that would load this architecture or its base.

    A class of the model's own comes along where its code can (see ``portable.own_code``). One that no other process can
    import, as it is defined in a script or a notebook, is loaded where it is defined again, and is not named.
    """
    config, own = model.config, own_class(type(model)).__name__
    told = {auto: ref for auto, ref in (getattr(config, "auto_map", None) or {}).items() if isinstance(ref, str)}
    models = {auto: ref.rpartition(".")[2] for auto, ref in told.items() if auto.startswith("AutoModel")}
    found = {auto: f"{LOADER_NAME}.{name}" for auto, name in models.items()}
    for auto in AUTO_CLASSES:
        mapping = getattr(transformers, auto)._model_mapping
        listed = mapping.get(type(config), ())
        names = {cls.__name__ for cls in (listed if isinstance(listed, (list, tuple)) else (listed,))}
        if own in names:
            found[auto] = f"{LOADER_NAME}.{own}"
        elif auto == "AutoModel" and names:
            found[auto] = f"{LOADER_NAME}.{sorted(names)[0]}"
    if has_importable_code(type(config)):
        found["AutoConfig"] = f"{LOADER_NAME}.{type(config).__name__}"
    return {auto: ref for auto, ref in found.items() if _can_be_found(model, ref)}


def _can_be_found(model: PreTrainedModel, ref: str) -> bool:
    """Whether the loader can give a class: one of transformers, or one whose code comes along."""
    name, own = ref.rpartition(".")[2], own_class(type(model))
    for cls in (own, type(model.config), getattr(sys.modules.get(own.__module__), name, None)):
        if isinstance(cls, type) and cls.__name__ == name:
            return cls.__module__.startswith("transformers.") or has_importable_code(cls)
    return hasattr(transformers, name)
