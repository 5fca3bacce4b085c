"""Adapters on factors (LoRA: Hu et al., ICLR 2022, arXiv 2106.09685), merged into them: rank and format stay.

By default on every ``up``; Basis Sharing's protocol is r 8, alpha 32, learning rate 1e-4, constant, 2 epochs. A shared
``down`` takes none, as every layer's change would land in the one tensor. SVD-LLM trains one factor after the other
(``order: sequential``): first every ``down``, then every ``up``.
"""

import importlib.util
from collections.abc import Mapping
from typing import Any, cast

from transformers import PreTrainedModel

from pared.errors import ParedError
from pared.modules import SparseLinear
from pared.training.merge import merge_lora_keeping_zeros
from pared.training.parts import compressed_layers, unpack
from pared.training.pruned import pruned_layers
from pared.training.stage import Context, Loss, Prepared, Stage, own_loss

TARGETS, ORDERS = ("up", "down", "both"), ("together", "sequential")


def check(options: Mapping[str, Any]) -> None:
    """Refuse what cannot be.

    Raises:
        ValueError: an unknown value, or a rank below 1.
    """
    for name, valid in (("targets", TARGETS), ("order", ORDERS)):
        if options[name] not in valid:
            raise ValueError(f"option {name}: expected one of {', '.join(valid)}, found {options[name]!r}")
    if options["rank"] < 1:
        raise ValueError(f"option rank: expected 1 or more, found {options['rank']}")


def stages(options: Mapping[str, Any]) -> tuple[Stage, ...]:
    """Return one stage, or SVD-LLM's two."""
    if options["order"] == "together":
        return (Stage("lora", lambda context: _prepare(context, options["targets"])),)
    return tuple(Stage(f"lora {factor}", _on(factor), share=0.5) for factor in ("down", "up"))


def _on(factor: str) -> Any:
    return lambda context: _prepare(context, factor)


def _prepare(context: Context, targets: str) -> Prepared:
    options = context.options
    return adapt(context, targets, options["rank"], options["alpha"], options["dropout"])


def adapt(
    context: Context, targets: str, rank: int, alpha: float, dropout: float = 0.0, loss: Loss = own_loss
) -> Prepared:
    """Put adapters on factors, which alone train, and are merged at the end.

    Args:
        context: of the stage.
        targets: one of ``TARGETS``.
        rank: of the adapters.
        alpha: divided by the rank what they count.
        dropout: of what they read.
        loss: of a batch.

    Raises:
        ParedError: peft is not installed, or there is no such factor.
    """
    if importlib.util.find_spec("peft") is None:
        raise ParedError("adapters need the package peft; install it with: pip install 'pared[train]'")
    from peft import LoraConfig, get_peft_model

    model = context.model
    model.requires_grad_(False)
    unpack(model)
    names = _names(model, targets)
    if not names:
        raise ParedError(
            f"{context.tuning.model} has no {targets!r} factor to adapt"
            + ("; every basis of it is shared: adapt up" if targets == "down" else "")
        )
    adapted = get_peft_model(
        model,
        LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=names, bias="none"),
    )

    def finish() -> PreTrainedModel:
        if pruned_layers(model):
            return merge_lora_keeping_zeros(adapted)
        return cast("PreTrainedModel", adapted.merge_and_unload())

    return Prepared(adapted, finish, loss)


def _names(model: PreTrainedModel, targets: str) -> list[str]:
    """Return full names of the layers that get an adapter; a sparse layer is adapted itself."""
    names: list[str] = []
    for name, layer in compressed_layers(model).items():
        if isinstance(layer, SparseLinear):
            names.append(name)
            continue
        if targets in ("up", "both"):
            names.append(f"{name}.up")
        if targets in ("down", "both") and layer.down is not None and layer.shares is None:
            names.append(f"{name}.down")
    return names
