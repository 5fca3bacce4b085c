"""Adapters (LoRA: Hu et al., ICLR 2022, arXiv 2106.09685), merged into what they adapt: rank and format stay.

By default on ``up`` of every layer that pared made; a pattern names others, dense ones too. A shared ``down`` takes
none, as every layer's change would land in the one tensor. SVD-LLM trains one factor after the other
(``order: sequential``): first every ``up``, then every ``down``, each for as long as was asked.
"""

import importlib.util
import re
import warnings
from collections.abc import Mapping
from typing import Any, cast

from torch import nn
from transformers import PreTrainedModel

from pared.errors import ParedError
from pared.modules import LowRankLinear, PivotedLinear
from pared.names import match, option_called
from pared.schema.manifest import Manifest
from pared.structure import find_blocks
from pared.structure.linear import LINEAR_TYPES
from pared.training.masks import merge_lora_keeping_zeros, pruned_layers
from pared.training.method import Context, Loss, Prepared, Stage, own_loss
from pared.training.options import ALL, PEFT, patterns_of
from pared.training.trainable import COMPRESSED, changed_layers, compressed_layers, unpack


def stages(options: Mapping[str, Any]) -> tuple[Stage, ...]:
    """Return one stage, or SVD-LLM's two."""
    if options["order"] == "together":
        return (Stage("lora", lambda context: _prepare(context, context.options["factor"])),)
    return tuple(Stage(f"lora {factor}", _on(factor)) for factor in ("up", "down"))


def _on(factor: str) -> Any:
    return lambda context: _prepare(context, factor)


def _prepare(context: Context, factor: str) -> Prepared:
    options = context.options
    if options["order"] == "sequential":  # what the second stage would miss is reported before the first is trained
        _require_some(context, options["targets"], "down")
    return adapt(context, options["rank"], options["alpha"], options["dropout"], options["targets"], factor)


def adapt(
    context: Context,
    rank: int,
    alpha: float,
    dropout: float = 0.0,
    targets: str = ALL,
    factor: str = "up",
    loss: Loss = own_loss,
) -> Prepared:
    """Put adapters on layers, which alone train, and are merged at the end.

    Args:
        context: of the stage.
        rank: of the adapters.
        alpha: divided by the rank what they count.
        dropout: of what they read.
        targets: ``compressed``, ``peft``, or patterns of layers with commas; a name without a star is the end of one.
        factor: of low-rank layers, one of ``FACTORS``; other layers are adapted themselves.
        loss: of a batch.

    Raises:
        ParedError: peft is not installed, a pattern matches no layer, or they have no such factor.
    """
    if importlib.util.find_spec("peft") is None:
        raise ParedError("adapters need the package peft; install it with: pip install peft")
    from peft import LoraConfig, get_peft_model

    model = context.model
    model.requires_grad_(False)
    unpack(model)
    names, notes = _require_some(context, targets, factor), _left_out(context, targets, factor)
    exactly = "|".join(map(re.escape, names))  # PEFT takes the names of a list for ends of names
    config = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=exactly, bias="none")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "fan_in_fan_out is set")  # PEFT sets it itself, layer by layer
        adapted = get_peft_model(model, config)

    def finish() -> PreTrainedModel:
        if pruned_layers(model):
            return merge_lora_keeping_zeros(adapted)
        return cast("PreTrainedModel", adapted.merge_and_unload())

    return Prepared(adapted, finish, loss, notes=notes)


def _left_out(context: Context, targets: str, factor: str) -> list[str]:
    """Say which bases take no adapter though ``down`` is asked for."""
    if factor == "up":
        return []
    chosen = _chosen(context.model, targets, context.manifest)
    shared = [name for name, layer in chosen.items() if getattr(layer, "shares", None)]
    return [f"the bases of {len(shared)} layers are shared and take no adapter, as every layer's change would land in "
            f"the one tensor; the first is {shared[0]}"] if shared else []  # fmt: skip


def _require_some(context: Context, targets: str, factor: str) -> list[str]:
    names = adapted_names(context.model, targets, factor, context.manifest)
    if not names:
        raise ParedError(
            f"{context.tuning.model} has no {factor!r} factor to adapt in the layers {targets}"
            + ("; every basis of theirs is shared: adapt up, with order=together" if factor == "down" else "")
        )
    return names


def adapted_names(model: PreTrainedModel, targets: str, factor: str, manifest: Manifest | None = None) -> list[str]:
    """Return the full names of the linear layers that get an adapter.

    A layer that is not factorised, be it sparse, narrow or dense, is adapted itself.

    Args:
        model: that pared compressed.
        targets: as of :func:`adapt`.
        factor: as of :func:`adapt`.
        manifest: of the folder the model is of; without it one of plain layers alone was changed nowhere.

    Raises:
        ParedError: a pattern matches no layer, or PEFT has no default for the architecture.
    """
    names: list[str] = []
    for name, layer in _chosen(model, targets, manifest).items():
        if not isinstance(layer, (LowRankLinear, PivotedLinear)):
            names.append(name)
            continue
        if factor in ("up", "both"):
            names.append(f"{name}.up")
        if factor in ("down", "both") and layer.down is not None and layer.shares is None:
            names.append(f"{name}.down")
    return names


def _chosen(model: PreTrainedModel, targets: str, manifest: Manifest | None) -> dict[str, nn.Module]:
    """Return the layers that targets name."""
    if targets == ALL:
        return changed_layers(model, manifest) or adaptable(model)
    layers = adaptable(model)
    patterns = _default_of_peft(model) if targets == PEFT else patterns_of(targets)
    chosen = match([_as_pattern(one, layers) for one in patterns], layers)
    return {name: layer for name, layer in layers.items() if name in chosen}


def adaptable(model: PreTrainedModel) -> dict[str, nn.Module]:
    """Return what may be adapted by name: layers that pared made, and the other linear layers inside the blocks."""
    compressed = compressed_layers(model)
    inside = {id(part) for layer in compressed.values() for part in layer.modules()}
    in_blocks = {id(part) for block in find_blocks(model) for part in block.modules()} - inside
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, COMPRESSED) or (isinstance(module, LINEAR_TYPES) and id(module) in in_blocks)
    }


def _as_pattern(asked: str, names: Mapping[str, object]) -> str:
    """Return a pattern; a name without a star that is no whole one is the end of names, as PEFT takes it."""
    return asked if asked in names or any(sign in asked for sign in "*?[") else f"*.{asked}"


def _default_of_peft(model: PreTrainedModel) -> list[str]:
    from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as DEFAULTS

    kind = str(model.config.get_text_config().model_type)
    found = DEFAULTS.get(kind) or DEFAULTS.get(str(model.config.model_type))
    if not isinstance(found, (list, tuple, set)):
        raise ParedError(f"PEFT has no default targets for a model of type {kind!r}; name the layers to adapt: "
                         f"{option_called('targets', '*.q_proj,*.v_proj')}")  # fmt: skip
    return sorted(found)
