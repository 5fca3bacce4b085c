"""How a compressed folder becomes a model again: the transformers quantizer.

This file, ``format``, ``portable`` and the files of ``modules/`` are also what every saved folder carries as
``modeling_pared.py``, for machines without the package (``trust_remote_code=True``). So they may use torch,
transformers and each other only.
"""

import re
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING

from pared.checkpoint.format import NOTICE, QUANT_METHOD, ParedConfig, module_type
from pared.checkpoint.portable import IS_COPY, module_map, with_remote_code
from pared.modules.adapters import teach_peft
from pared.modules.narrow import NarrowConv1D, NarrowLinear, set_counts
from pared.modules.opened import Layout, open_by_layout
from pared.modules.quantized import QuantizedLinear
from pared.modules.replace import replace_module
from pared.modules.shared import DOWN, BasisHolder, share
from pared.modules.sparse import SparseLinear

# Where transformers is imported after this package, this file is read while modeling_utils is only half imported.
if TYPE_CHECKING:
    from transformers import PreTrainedModel


class ParedQuantizer(HfQuantizer):
    """Puts the modules of the map in place before transformers loads the weights."""

    requires_calibration = True

    def _process_model_before_weight_loading(self, model: "PreTrainedModel", **_: object) -> None:
        told = self.quantization_config
        install_empty(model, told.modules, told.shared, told.heads, told.layouts())
        if told.guard is not None:
            guard = told.guard.removeprefix(f"{model.base_model_prefix}.")
            known = model._keys_to_ignore_on_load_unexpected or ()
            model._keys_to_ignore_on_load_unexpected = {*known, rf"^{NOTICE}$", rf"(^|\.){re.escape(guard)}$"}

    def _process_model_after_weight_loading(self, model: "PreTrainedModel", **_: object) -> None:
        require_shapes(model)
        for module in model.modules():
            if isinstance(module, SparseLinear) and not module.values.is_meta:  # what is offloaded stays packed
                module.unpack_()
            elif isinstance(module, QuantizedLinear):
                module.check()
        # The weights are plain floating point numbers: half(), float(), Trainer and PEFT treat them as such.
        model.is_quantized = False
        with_remote_code(model)

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


def install_empty(
    model: nn.Module,
    entries: dict[str, dict[str, Any]],
    shared: dict[str, str] | None = None,
    heads: dict[str, dict[str, int]] | None = None,
    experts: dict[str, Layout] | None = None,
) -> None:
    """Replace modules by the empty ones of the map, in place; experts are opened before.

    Args:
        model: the model, or its base without head: names are looked up with and without the base's prefix.
        entries: the ``modules`` of the map.
        shared: the shared tensors of the map.
        heads: the numbers of heads of the map.
        experts: the layouts of experts of the map.

    Raises:
        ValueError: a name is not in the model, or a shape or number does not fit.
    """
    for name, layout in (experts or {}).items():
        path, _ = _place(model, name)
        try:
            open_by_layout(model, path, layout)
        except ValueError as error:
            raise ValueError(f"experts of {name}: {error}") from None
    paths: dict[str, str] = {}
    for name, entry in entries.items():
        path, old = _place(model, name)
        _require_fit(name, old, entry)
        replace_module(model, path, empty_module(entry, device=old.weight.device, dtype=old.weight.dtype))
        paths[name + DOWN] = path + DOWN
    tie(model, {paths[alias]: paths[owner] for alias, owner in (shared or {}).items()})
    for name, counts in (heads or {}).items():
        _, module = _place(model, name)
        for attribute, count in counts.items():
            dense = vars(module).get(attribute)
            if type(dense) is not int or not 0 < count <= dense:
                raise ValueError(f"heads of {name}: {attribute} is {count} in the map, {dense!r} in the model")
        set_counts(module, counts)


def _place(model: nn.Module, name: str) -> tuple[str, Any]:
    """Return where a module of the map is, and the module; names are looked up with and without the base's prefix.

    Raises:
        ValueError: it is not in the model.
    """
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    for path in (name, name.removeprefix(prefix), prefix + name):
        if (found := _submodule(model, path)) is not None:
            return path, found
    raise ValueError(f"map entry {name}: {type(model).__name__} has no such module")


def _require_fit(name: str, old: Any, entry: dict[str, Any]) -> None:
    """Refuse an entry that is not of the shape of the module it replaces; one that lost channels is smaller."""
    shape = tuple(old.weight.shape)
    sides, told = shape[::-1] if isinstance(old, Conv1D) else shape, (entry["out_features"], entry["in_features"])
    kind = module_type(entry["kind"])
    plain = issubclass(kind, (NarrowLinear, NarrowConv1D))
    if plain or entry.get("narrow"):
        fits = len(sides) == 2 and all(new <= side for new, side in zip(told, sides, strict=True))
        fits &= not plain or isinstance(old, Conv1D) == (kind is NarrowConv1D)
    else:
        fits = sorted(shape) == sorted(told)
    if not fits:
        raise ValueError(f"map entry {name}: shape {sorted(shape)} in the model, {entry} in the map")


def require_shapes(model: nn.Module) -> None:
    """Refuse stored tensors whose shapes differ from the map's; transformers 5.19 takes them as they are.

    A tensor that is offloaded to the disk is not seen.

    Raises:
        ValueError: one has not; names it.
    """
    for name, entry in module_map(model).items():
        expected = {key: one.shape for key, one in empty_module(entry, device="meta").state_dict().items()}
        for key, one in model.get_submodule(name).state_dict().items():
            if one.shape != expected.get(key, one.shape):
                raise ValueError(f"{name}.{key} is {tuple(one.shape)}, the map says {tuple(expected[key])}")


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
    return module_type(entry["kind"])(**arguments, device=device, dtype=dtype)


def _submodule(model: nn.Module, path: str) -> Any:
    try:
        return model.get_submodule(path)
    except AttributeError:
        return None


# The package and folders' own copies may meet in one process, in any order: the package takes over, a copy yields.
if not IS_COPY:
    AUTO_QUANTIZATION_CONFIG_MAPPING.pop(QUANT_METHOD, None)
    AUTO_QUANTIZER_MAPPING.pop(QUANT_METHOD, None)
if QUANT_METHOD not in AUTO_QUANTIZER_MAPPING:
    register_quantization_config(QUANT_METHOD)(ParedConfig)
    register_quantizer(QUANT_METHOD)(ParedQuantizer)

teach_peft()
