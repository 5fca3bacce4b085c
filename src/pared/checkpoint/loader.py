"""How a compressed folder becomes a model again: the transformers quantizer and the format's map.

This file and the files of ``modules/`` are also what every saved folder carries as ``modeling_pared.py``, for machines
without the package (``trust_remote_code=True``). So it may use torch, transformers and ``modules/`` only.
"""

import ast
import os
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PreTrainedModel
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.utils.quantization_config import QuantizationConfigMixin

from pared.modules.low_rank import LowRankLinear
from pared.modules.packing import pack
from pared.modules.pivoted import PivotedLinear
from pared.modules.replace import replace_module
from pared.modules.shared import BasisHolder, share
from pared.modules.sparse import SparseLinear

QUANT_METHOD = "pared"
FORMAT_VERSION = 1
LOADER_NAME = "modeling_pared"
DOWN = ".down.weight"
IS_COPY = __name__.rpartition(".")[2] == LOADER_NAME

# kind in the map -> (module class, the keys its entry has beside `kind`)
MODULE_TYPES: dict[str, tuple[type[LowRankLinear | PivotedLinear | SparseLinear], frozenset[str]]] = {
    "low_rank": (LowRankLinear, frozenset({"in_features", "out_features", "rank", "bias"})),
    "pivoted": (PivotedLinear, frozenset({"in_features", "out_features", "rank", "bias"})),
    "sparse": (SparseLinear, frozenset({"in_features", "out_features", "bias", "stored", "kept", "group"})),
}


class ParedConfig(QuantizationConfigMixin):
    """The map of a compressed checkpoint: ``quantization_config`` in ``config.json``.

    Args:
        format_version: of the folder's layout.
        modules: for every changed module, by full name, its kind, shape and exact rank.
        shared: for every tensor that is not stored, as it is that of another module, the name of the one that is.
        quant_method: always ``pared``.

    Raises:
        ValueError: written by a newer version, a key this version does not know, or a malformed map.
    """

    def __init__(
        self,
        format_version: int = FORMAT_VERSION,
        modules: dict[str, dict[str, Any]] | None = None,
        shared: dict[str, str] | None = None,
        quant_method: str = QUANT_METHOD,
        **unknown: object,
    ) -> None:
        if format_version > FORMAT_VERSION or unknown:
            raise ValueError(
                f"checkpoint of pared format version {format_version}"
                f"{f' with unknown keys {sorted(unknown)}' if unknown else ''}; this loader reads version "
                f"{FORMAT_VERSION}: update pared"
            )
        self.quant_method = quant_method
        self.format_version = format_version
        self.modules = _checked(modules or {})
        self.shared = _checked_shared(shared or {}, self.modules)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as they are stored, without a list of shared tensors where there are none."""
        fields: dict[str, Any] = super().to_dict()
        return fields if self.shared else {key: value for key, value in fields.items() if key != "shared"}


def _checked(modules: Any) -> dict[str, dict[str, Any]]:
    """Return the map if every entry of it has a known kind and exactly that kind's keys."""
    if not isinstance(modules, dict):
        raise ValueError(f"the map of modules is {type(modules).__name__}, expected an entry by module name")
    for name, entry in modules.items():
        kind = entry.get("kind") if isinstance(entry, dict) else None
        if kind not in MODULE_TYPES or entry.keys() - {"kind"} != MODULE_TYPES[kind][1]:
            raise ValueError(f"map entry {name}: unknown or malformed {entry}; known kinds: {sorted(MODULE_TYPES)}")
    return modules


def _checked_shared(shared: Any, modules: dict[str, dict[str, Any]]) -> dict[str, str]:
    """Return the shared tensors if every one of them and its owner are a ``down`` of the map, of one shape."""
    if not isinstance(shared, dict):
        raise ValueError(f"the shared tensors are {type(shared).__name__}, expected the owner's name by tensor name")
    shapes = {
        name + DOWN: {key: entry[key] for key in ("kind", "in_features", "rank")}
        for name, entry in modules.items()
        if "rank" in entry
    }
    for alias, owner in shared.items():
        for tensor in (alias, owner):
            if not isinstance(tensor, str) or tensor not in shapes:
                raise ValueError(f"shared tensor {alias}: {tensor} is not the {DOWN[1:]} of a module in the map")
        if owner in shared:
            raise ValueError(f"shared tensor {alias}: its owner {owner} is shared itself, expected one that is stored")
        if shapes[alias] != shapes[owner]:
            raise ValueError(
                f"shared tensor {alias}: {shapes[alias]} in the map, but its owner {owner} is {shapes[owner]}"
            )
    return shared


class ParedQuantizer(HfQuantizer):
    """Puts the modules of the map in place before transformers loads the weights."""

    requires_calibration = True

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **_: object) -> None:
        install_empty(model, self.quantization_config.modules, self.quantization_config.shared)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **_: object) -> None:
        for module in model.modules():
            if isinstance(module, SparseLinear) and not module.values.is_meta:  # what is offloaded stays packed
                module.unpack_()
        # The weights are plain floating point numbers: half(), float(), Trainer and PEFT treat them as such.
        model.is_quantized = False
        make_portable(model)

    def is_serializable(self) -> bool:
        """Return true: a loaded model can be saved again."""
        return True

    @property
    def is_trainable(self) -> bool:
        """True: factors are ordinary parameters."""
        return True

    @property
    def is_qat_trainable(self) -> bool:
        """True: they can be trained without adapters too."""
        return True

    @property
    def is_compileable(self) -> bool:
        """True: nothing here breaks a graph."""
        return True


def install_empty(model: nn.Module, entries: dict[str, dict[str, Any]], shared: dict[str, str] | None = None) -> None:
    """Replace modules by the empty ones of the map, in place.

    Args:
        model: the model, or its base without head: names are looked up with and without the base's prefix.
        entries: the ``modules`` of the map.
        shared: the shared tensors of the map.

    Raises:
        ValueError: a name is not in the model, or a shape does not fit.
    """
    paths: dict[str, str] = {}
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    for name, entry in entries.items():
        for path in (name, name.removeprefix(prefix), prefix + name):
            if (old := _submodule(model, path)) is not None:
                break
        else:
            raise ValueError(f"map entry {name}: {type(model).__name__} has no such module")
        shape = sorted(old.weight.shape)
        if shape != sorted((entry["out_features"], entry["in_features"])):
            raise ValueError(f"map entry {name}: shape {shape} in the model, {entry} in the map")
        replace_module(model, path, empty_module(entry, device=old.weight.device, dtype=old.weight.dtype))
        paths[name + DOWN] = path + DOWN
    tie(model, {paths[alias]: paths[owner] for alias, owner in (shared or {}).items()})


def tie(model: nn.Module, shared: dict[str, str]) -> None:
    """Make tensors one, and tell transformers, so that they are saved once and not missing when they are loaded.

    Args:
        model: its modules are in place.
        shared: for every tensor the one that it is; replaces what was said before.

    Raises:
        ValueError: the shape of a tensor is not that of its owner.
    """
    for module in model.modules():
        if isinstance(module, BasisHolder):
            module.shares = None
    for alias, owner in shared.items():
        share(model.get_submodule(alias.removesuffix(DOWN)), model.get_submodule(owner.removesuffix(DOWN)), owner)
    # The first is read by save_pretrained and tie_weights(), the second by from_pretrained; embeddings may be in both.
    for attribute in ("_tied_weights_keys", "all_tied_weights_keys"):
        known = getattr(model, attribute, None) or {}
        others = {alias: owner for alias, owner in known.items() if not alias.endswith(DOWN)}
        if known != others | shared:
            setattr(model, attribute, others | shared)


def empty_module(
    entry: dict[str, Any], device: torch.device | str | None = None, dtype: torch.dtype | None = None
) -> nn.Module:
    """Return the module that a map entry describes, its weights not yet set."""
    arguments = {key: value for key, value in entry.items() if key != "kind"}
    return MODULE_TYPES[entry["kind"]][0](**arguments, device=device, dtype=dtype)


def _submodule(model: nn.Module, path: str) -> Any:
    try:
        return model.get_submodule(path)
    except AttributeError:
        return None


class PortableMixin:
    """Saves the loader with the model, so that the folder loads on machines without the package."""

    def save_pretrained(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
        """Save as transformers does, and write the loader beside it."""
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{LOADER_NAME}.py").write_text(loader_source(), encoding="utf-8")
        super().save_pretrained(save_directory, *args, **kwargs)  # type: ignore[misc]


_portable: dict[type, type] = {}


def is_portable(cls: type) -> bool:
    """Whether a model class saves the loader with itself, be it by this module or by a folder's own copy of it."""
    return any(base.__name__ == PortableMixin.__name__ for base in cls.__mro__)


def portable_class(cls: type) -> type:
    """Return the subclass of a transformers model class, of the same name, that saves the loader with itself."""
    if is_portable(cls):
        return cls
    if cls not in _portable:
        _portable[cls] = type(cls.__name__, (PortableMixin, cls), {"__module__": __name__, "__doc__": cls.__doc__})
    return _portable[cls]


def make_portable(model: PreTrainedModel) -> None:
    """Make a model save the loader with itself, in place."""
    model.__class__ = portable_class(type(model))


def __getattr__(name: str) -> Any:
    """Return the portable twin of a transformers class: what ``auto_map`` names, and what pickle looks up."""
    if name.startswith("_") or not isinstance(cls := getattr(transformers, name, None), type):
        raise AttributeError(f"module {__name__} has no attribute {name}")
    return portable_class(cls)


def loader_source() -> str:
    """Return the text of ``modeling_pared.py``: this very file where it is one, else put together from its parts."""
    if IS_COPY:
        return Path(__file__).read_text(encoding="utf-8")
    owners = [
        replace_module.__module__,
        BasisHolder.__module__,
        pack.__module__,
        *(cls.__module__ for cls, _ in MODULE_TYPES.values()),
        __name__,
    ]
    parts = [Path(str(sys.modules[owner].__file__)).read_text(encoding="utf-8") for owner in dict.fromkeys(owners)]
    return "\n\n".join(_without_own_imports(part) for part in parts)


def _without_own_imports(source: str) -> str:
    """Return a file's text without what it imports from the package, as all of that is in the text beside it."""
    own = {
        line
        for node in ast.parse(source).body
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("pared.")
        for line in range(node.lineno, (node.end_lineno or node.lineno) + 1)
    }
    return "\n".join(line for number, line in enumerate(source.splitlines(), start=1) if number not in own)


# The package and folders' own copies may meet in one process, in any order: the package takes over, a copy gives way.
if not IS_COPY:
    AUTO_QUANTIZATION_CONFIG_MAPPING.pop(QUANT_METHOD, None)
    AUTO_QUANTIZER_MAPPING.pop(QUANT_METHOD, None)
if QUANT_METHOD not in AUTO_QUANTIZER_MAPPING:
    register_quantization_config(QUANT_METHOD)(ParedConfig)
    register_quantizer(QUANT_METHOD)(ParedQuantizer)
