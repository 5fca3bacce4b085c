"""A compressed model that saves what is needed to load it: its map as it is now, the loader, the code of its own class.

This file is a part of the loader that a saved folder carries, so it may use torch, transformers and ``modules/`` only.
"""

import ast
import os
import re
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from torch import nn
from transformers.dynamic_module_utils import get_relative_import_files

from pared.checkpoint.format import LOADER_NAME, MODULE_TYPES, NOTICE, ParedConfig, added_kinds, module_type
from pared.importing import when_imported
from pared.modules.adapters import CLASSES, teach_peft
from pared.modules.opened import OpenedExperts
from pared.modules.packing import pack
from pared.modules.quantized import QuantizedLinear
from pared.modules.replace import replace_module
from pared.modules.shared import DOWN, BasisHolder

# Where transformers is imported after this package, this file is read while modeling_utils is only half imported.
if TYPE_CHECKING:
    from transformers import PreTrainedModel

IS_COPY = __name__.rpartition(".")[2] == LOADER_NAME
# Where PEFT, torch.compile, FSDP and checkpointing of activations put a layer that they stand before.
WRAPPERS = ("base_layer", "original_module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
COPIES = {*WRAPPERS, "modules_to_save"}
DYNAMIC = "transformers_modules."  # where transformers puts code that came with a folder


def module_map(model: nn.Module) -> dict[str, dict[str, Any]]:
    """Return the entry of every module that stands where a linear layer stood, from the modules themselves."""
    entries: dict[str, dict[str, Any]] = {}
    kinds = _kinds()
    modules: list[tuple[str, Any]] = list(model.named_modules())
    for name, module in modules:
        if name.rpartition(".")[0] in entries:
            continue  # a factor in few bits is told of by its layer
        for kind, cls in kinds.items():
            if isinstance(module, cls):
                entries[name] = {"kind": kind, **module.entry()}
    return entries


def _kinds() -> dict[str, Any]:
    """Return the classes of modules by kind: of packages those that were imported, as a model has no others."""
    added = {kind: entry for kind, entry in added_kinds().items() if entry.module in sys.modules}
    return {kind: module_type(kind) for kind in (*MODULE_TYPES, *added)}


def still_shared(model: nn.Module, shared: dict[str, str]) -> dict[str, str]:
    """Return which of the shared tensors are so still: a layer that an adapter was merged into has its own.

    Args:
        model: of which modules may have been replaced since.
        shared: the tensor that each was, as in the map; names with or without the base's prefix.

    Returns:
        The same where nothing changed; where an owner left its group, the first that stayed owns the basis.
    """
    kept: dict[str, str] = {}
    heirs: dict[str, str] = {}
    for alias, owner in shared.items():
        if not _shares(model, alias):
            continue
        heir = heirs.setdefault(owner, owner if _shares(model, owner) else alias)
        if heir != alias:
            kept[alias] = heir
    return kept


def _shares(model: nn.Module, tensor: str) -> bool:
    return getattr(_inside(_found(model, tensor.removesuffix(DOWN))), "shares", None) is not None


class PortableMixin:
    """Saves the loader with the model, so that the folder loads on machines without the package.

    The class of a model with this in front keeps the name and module of the model's own class: PEFT records them.
    """

    _auto_class = None

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = "AutoModel") -> None:
        """Do nothing: transformers would save the file of the class and name it in ``auto_map`` past the loader."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle by the model's own class, as this one is found under no name."""
        reduced: Any = super().__reduce_ex__(max(2, int(protocol)))
        return _new, (own_class(reduced[1][0]), *reduced[1][1:]), *reduced[2:]

    def tie_weights(self, *args: Any, **kwargs: Any) -> Any:
        """Tie as transformers does, but for what is not shared any more."""
        for attribute in ("_tied_weights_keys", "all_tied_weights_keys"):
            known = self.__dict__.get(attribute) or {}
            factors = {alias: owner for alias, owner in known.items() if alias.endswith(DOWN)}
            kept = still_shared(self, factors)  # type: ignore[arg-type]
            if kept != factors:
                setattr(self, attribute, {key: value for key, value in known.items() if key not in factors} | kept)
        return super().tie_weights(*args, **kwargs)  # type: ignore[misc]

    def save_pretrained(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
        """Save as transformers does, and write the loader beside it."""
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        _describe_anew(self)
        own = own_code(self)
        (folder / f"{LOADER_NAME}.py").write_text(loader_source(own), encoding="utf-8")
        for file in code_files(own):
            shutil.copyfile(file, folder / file.name)
        if len(args) < 2:  # the second is the state
            kwargs["state_dict"] = _guarded(self, kwargs.get("state_dict"))
        _leave_guard(self)
        # Weights are plain numbers, and for the sake of a quantizer transformers would drop the state it is given.
        quantizer = self.__dict__.pop("hf_quantizer", None)
        try:
            super().save_pretrained(save_directory, *args, **kwargs)  # type: ignore[misc]
        finally:
            if quantizer is not None:
                self.__dict__["hf_quantizer"] = quantizer


def _guarded(model: "PreTrainedModel", state: dict[str, torch.Tensor] | None) -> dict[str, torch.Tensor] | None:
    """Return what is saved of a model, with what stops whoever loads it without this package (``ParedConfig.guard``).

    Args:
        model: that is saved.
        state: that it is given; its own if there is none.
    """
    recorded = getattr(model.config, "quantization_config", None)
    guard = recorded.guard if isinstance(recorded, ParedConfig) else None
    if guard is None:
        return state
    if model.base_model is model:  # saved without its head
        guard = guard.removeprefix(f"{model.base_model_prefix}.")
    own = model.state_dict() if state is None else state
    return {**own, **({guard: torch.empty(0)} if guard not in own else {}), NOTICE: torch.empty(0)}


def _leave_guard(model: Any) -> None:
    """Have transformers save a guard in the place of experts by its own name, not by those of single experts.

    A model that was read from a checkpoint of single experts saves what it merged as it came.
    """
    recorded = getattr(model.config, "quantization_config", None)
    fused = [f"{name}.{entry['first']}" for name, entry in getattr(recorded, "experts", {}).items()]
    if not fused:
        return
    # Not while this file is read, when transformers may be half imported.
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import PrefixChange, WeightConverter

    found = getattr(model, "_weight_conversions", None)
    if found is None:
        found = [one for one in get_model_conversion_mapping(model, add_legacy=False) if type(one) is not PrefixChange]
    model._weight_conversions = [
        one
        for one in found
        if not isinstance(one, WeightConverter)
        or not any(re.search(pattern, name) for pattern in one.target_patterns for name in fused)
    ]


def _describe_anew(model: "PreTrainedModel") -> None:
    """Make the map say what the modules are by now: an adapter was merged, or a layer put in another's place."""
    recorded = getattr(model.config, "quantization_config", None)
    if not isinstance(recorded, ParedConfig):
        return
    modules, shared = _modules_now(model, recorded.modules), still_shared(model, recorded.shared)
    if (modules, shared) != (recorded.modules, recorded.shared):
        model.config.quantization_config = ParedConfig(
            modules=modules, shared=shared, heads=recorded.heads, experts=recorded.experts
        )
        PortableMixin.tie_weights(model)


def _modules_now(model: nn.Module, recorded: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return the map of a model some of whose modules were replaced since, by the names that the map gave them.

    What is not compressed any more is left out, and what is now is reported. A layer inside of a wrapper, as an adapter
    is one, is reported as before.
    """
    by_module = {id(model.get_submodule(name)): (name, entry) for name, entry in module_map(model).items()}
    modules: dict[str, dict[str, Any]] = {}
    for name, entry in recorded.items():
        module = _found(model, name)
        now = by_module.pop(id(module), None)
        if now is not None:
            modules[name] = now[1]
        elif by_module.pop(id(_inside(module)), None) is not None:
            modules[name] = entry
    return modules | {name: entry for name, entry in by_module.values() if not COPIES & set(name.split("."))}


def _found(model: nn.Module, name: str) -> nn.Module | None:
    """Return a module by its name in the map, which may have the base's prefix or lack it; None where there is none."""
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    for path in (name, name.removeprefix(prefix), prefix + name):
        try:
            return model.get_submodule(path)
        except AttributeError:
            continue
    return None


def _inside(module: nn.Module | None) -> nn.Module | None:
    """Return the layer that a wrapper holds, the module itself where it is none."""
    while module is not None and (inner := next(filter(None, map(module._modules.get, WRAPPERS)), None)) is not None:
        module = inner
    return module


_portable: dict[type, type] = {}


def is_portable(cls: type) -> bool:
    """Whether a model class saves the loader with itself, be it by this module or by a folder's own copy of it."""
    return any(base.__name__ == PortableMixin.__name__ for base in cls.__mro__)


def own_class(cls: type) -> type:
    """Return the class that a portable one was made of."""
    return next(base for base in cls.__mro__ if not is_portable(base))


def portable_class(cls: type) -> type:
    """Return the subclass of a model class, of the same name and module, that saves the loader with itself."""
    if issubclass(cls, PortableMixin) or (IS_COPY and is_portable(cls)):
        return cls
    cls = own_class(cls)  # a copy's twin knows neither the modules nor the map of the package, which takes over
    if cls not in _portable:
        _portable[cls] = type(
            cls.__name__, (PortableMixin, cls), {"__module__": cls.__module__, "__doc__": cls.__doc__}
        )
    return _portable[cls]


def with_remote_code(model: "PreTrainedModel") -> None:
    """Make a model save the loader with itself, in place."""
    model.__class__ = portable_class(type(model))


def _new(cls: type, *rest: Any) -> Any:
    portable = portable_class(cls)
    return portable.__new__(portable, *rest)


def __getattr__(name: str) -> Any:
    """Return the portable twin of a transformers class, which ``auto_map`` names, or the class of adapters."""
    if IS_COPY and name in CLASSES:
        return CLASSES[name]()
    if name.startswith("_") or not isinstance(cls := getattr(transformers, name, None), type):
        raise AttributeError(f"module {__name__} has no attribute {name}")
    return portable_class(cls)


def has_importable_code(cls: type) -> bool:
    """Whether a class lies outside of transformers, in a file that another process can import."""
    module = sys.modules.get(cls.__module__)
    outside = not cls.__module__.startswith(("transformers.", "__main__"))
    return outside and getattr(module, "__file__", None) is not None and hasattr(module, cls.__name__)


def own_code(model: "PreTrainedModel") -> dict[str, type]:
    """Return the classes outside of transformers, by name, that ``auto_map`` has the loader give."""
    refs = [ref.split("--")[-1] for ref in (getattr(model.config, "auto_map", None) or {}).values() if type(ref) is str]
    cls = own_class(type(model))
    home = sys.modules.get(cls.__module__)
    found: dict[str, type] = {}
    for name in (ref.removeprefix(f"{LOADER_NAME}.") for ref in refs if ref.startswith(f"{LOADER_NAME}.")):
        for candidate in (cls, type(model.config), getattr(home, name, None)):
            if isinstance(candidate, type) and candidate.__name__ == name and has_importable_code(candidate):
                found[name] = own_class(candidate)
                break
    return found


def code_files(own: dict[str, type]) -> list[Path]:
    """Return the files that classes which came with a folder need beside the loader."""
    files: dict[str, Path] = {}
    for cls in own.values():
        if cls.__module__.startswith(DYNAMIC):
            file = Path(str(sys.modules[cls.__module__].__file__))
            for needed in (file, *map(Path, get_relative_import_files(file))):
                if needed.stem != LOADER_NAME:
                    files[needed.name] = needed
    return list(files.values())


def loader_source(own: dict[str, type] | None = None) -> str:
    """Return the text of ``modeling_pared.py``: this very file where it is one, else put together from its parts.

    Args:
        own: classes outside of transformers that it gives too.
    """
    if IS_COPY:
        return Path(__file__).read_text(encoding="utf-8")
    owners = [
        when_imported.__module__,
        replace_module.__module__,
        BasisHolder.__module__,
        pack.__module__,
        QuantizedLinear.__module__,
        OpenedExperts.__module__,
        *(cls.__module__ for cls, _ in MODULE_TYPES.values()),
        teach_peft.__module__,
        ParedConfig.__module__,
        __name__,
        f"{__package__}.loader",
    ]
    parts = [Path(str(sys.modules[owner].__file__)).read_text(encoding="utf-8") for owner in dict.fromkeys(owners)]
    return "\n\n".join([*(_without_own_imports(part) for part in parts), *map(_import_line, (own or {}).values())])


def _import_line(cls: type) -> str:
    """Return the lines that give the portable twin of a class: from a file beside the loader, or from a package."""
    module, name = cls.__module__, cls.__name__
    origin = f".{module.rpartition('.')[2]}" if module.startswith(DYNAMIC) else module
    twin = f"portable_class(_{name})" if issubclass(cls, transformers.PreTrainedModel) else f"_{name}"
    return f"from {origin} import {name} as _{name}\n\n{name} = {twin}\n"


def _without_own_imports(source: str) -> str:
    """Return a file's text without what it imports from the package, as all of that is in the text beside it."""
    own = {
        line
        for node in ast.parse(source).body
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("pared.")
        for line in range(node.lineno, (node.end_lineno or node.lineno) + 1)
    }
    return "\n".join(line for number, line in enumerate(source.splitlines(), start=1) if number not in own)
