"""Full fine-tuning: everything that stands where linear layers stood, and nothing else."""

from transformers import TrainerCallback

from pared.training.keep_zeros import KeepZeros
from pared.training.parts import compressed_layers, freeze, norms, unpack
from pared.training.precision import hold_in_float32
from pared.training.pruned import pruned_layers
from pared.training.stage import Context, Loss, Prepared, own_loss


def prepare(context: Context) -> Prepared:
    """Train all factors; a shared basis gets the sum of its members' gradients, and zeros stay zero."""
    return train_factors(context, own_loss, with_norms=bool(context.options["norms"]))


def train_factors(context: Context, loss: Loss, with_norms: bool) -> Prepared:
    """Make a model ready whose factors train, and its normalisations if that is asked for."""
    model = context.model
    freeze(model)
    unpack(model)
    for layer in compressed_layers(model).values():
        layer.requires_grad_(True)
    if with_norms:
        for norm in norms(model):
            norm.requires_grad_(True)
    hold_in_float32(model)
    keep: list[TrainerCallback] = [KeepZeros()] if pruned_layers(model) else []
    return Prepared(model, finish=lambda: model, loss=loss, callbacks=keep)
