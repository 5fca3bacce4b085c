"""Full fine-tuning: everything that stands where linear layers stood, or the whole model."""

from collections.abc import Mapping
from typing import Any

from transformers import TrainerCallback

from pared.training.masks import KeepZeros, pruned_layers
from pared.training.method import Context, Loss, Prepared, Stage, own_loss
from pared.training.precision import cast_trainable_to_float32
from pared.training.trainable import changed_layers, norms, unpack


def stages(_: Mapping[str, Any]) -> tuple[Stage, ...]:
    """Return the one stage."""
    return (Stage("full", prepare),)


def prepare(context: Context) -> Prepared:
    """Train on the model's own loss; a shared basis gets the sum of its members' gradients, and zeros stay zero."""
    return train_part(context, own_loss, str(context.options["train"]))


def train_part(context: Context, loss: Loss, part: str) -> Prepared:
    """Make a model ready of which a part trains: one of ``PARTS``."""
    model = context.model
    layers = changed_layers(model, context.manifest)
    if not layers:
        part = "all"
    model.requires_grad_(part == "all")
    unpack(model)
    for layer in layers.values():
        layer.requires_grad_(True)
    if part == "factors+norms":
        for norm in norms(model):
            norm.requires_grad_(True)
    cast_trainable_to_float32(model)
    keep: list[TrainerCallback] = [KeepZeros()] if pruned_layers(model) else []
    return Prepared(model, finish=lambda: model, loss=loss, callbacks=keep)
