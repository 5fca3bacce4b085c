"""From weights, their statistics and a method's options to a decomposition: what ``registry`` declares."""

from collections.abc import Sequence
from functools import partial

import torch

from pared.lowrank import asvd, fwsvd, loss_optimal, sharing, svd, whitening
from pared.lowrank.decomposition import Decomposition
from pared.lowrank.registry import Asvd, Fwsvd, LossOptimal, Statistics, fisher, output_gradient
from pared.schema.options import Options

Weights = Sequence[torch.Tensor]


def plain(W_ON: Weights, _: Sequence[Statistics], __: Options) -> Decomposition:
    """SVD of the weight alone."""
    (weight_ON,) = W_ON
    return svd.decompose(weight_ON)


def fisher_weighted(W_ON: Weights, statistics: Sequence[Statistics], options: Fwsvd) -> Decomposition:
    """FWSVD."""
    (weight_ON,), (own,), (name,) = W_ON, statistics, fisher(options)
    return fwsvd.decompose(weight_ON, own[name], options.fisher_power)


def scaled(W_ON: Weights, statistics: Sequence[Statistics], options: Asvd) -> Decomposition:
    """ASVD."""
    (weight_ON,), (own,) = W_ON, statistics
    return asvd.decompose(weight_ON, own["magnitude"], options.alpha)


def whitened(
    W_ON: Weights, statistics: Sequence[Statistics], _: Options, *, losses_only: bool = False
) -> Decomposition:
    """Whiten the inputs, by their Gram or, of one weight, by that of the outputs."""
    if len(W_ON) == 1 and "gram" not in statistics[0]:
        return whitening.decompose_by_outputs(W_ON[0], statistics[0]["output_gram"], losses_only=losses_only)
    gram_NN = statistics[0]["gram"] if len(W_ON) == 1 else sharing.pooled(statistics, "gram")
    return whitening.decompose_group(W_ON, gram_NN, losses_only=losses_only)


whitened_losses = partial(whitened, losses_only=True)


def both_sides(W_ON: Weights, statistics: Sequence[Statistics], options: LossOptimal) -> Decomposition:
    """Weight inputs and outputs."""
    names = output_gradient(options)
    weightings = [
        next((own[name] for name in names), weight_ON.new_ones(()))
        for weight_ON, own in zip(W_ON, statistics, strict=True)
    ]
    gram_NN = statistics[0]["mean_gram"] if len(W_ON) == 1 else sharing.pooled(statistics, "mean_gram")
    return loss_optimal.decompose_group(
        W_ON,
        gram_NN,
        weightings,
        damp_inputs=options.input_shrinkage == 0,  # what was shrunk is of full rank
        damp_outputs=options.output_shrinkage == 0,
    )
