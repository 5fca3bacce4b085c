"""Basel (Li et al., TMLR 2025, arXiv 2405.15877): the importance of a weight's bases is relearned on a task.

First every basis is kept and its importance is learned, with a few new bases; then bases are dropped, a
little at a time, by what they have come to be worth; what is left becomes two factors, which are tuned on. In the
ablation with ``l1`` nothing is dropped meanwhile: a penalty pulls coefficients to 0, and the cut comes at the end.
"""

import math
from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, TrainerCallback

from pared.errors import ParedError
from pared.modules import replace_module
from pared.names import option_called
from pared.schema.plan import LowRank
from pared.structure.linear import bias_of, weight_of
from pared.structure.model import find_anatomy
from pared.training.basel.bases import Bases, decomposed
from pared.training.basel.factorise import put_back
from pared.training.basel.layer import BasisLinear
from pared.training.basel.penalty import L1
from pared.training.basel.prune_callback import BatchLoss, Prune
from pared.training.basel.schedule import falling, prune_steps, rate_factor
from pared.training.basel.select import Weight, share_for
from pared.training.dataset import Row, collate
from pared.training.method import Context, Prepared, Stage, own_loss
from pared.training.precision import cast_trainable_to_float32, mixed_precision

LEAST_MASS = 0.01  # for learning rates: where a budget leaves hardly more than the new bases, K says nothing


def needs_whole(options: Mapping[str, Any]) -> str:
    """Return why these options do not train weights in shards, nothing if they do."""
    if options["l1"]:
        return "the penalty l1 is on whole coefficients"
    return (
        "" if options["importance"] == "magnitude" else f"importance {options['importance']} takes gradients by itself"
    )


def stages(options: Mapping[str, Any]) -> tuple[Stage, ...]:
    """Return weighing and dropping, then tuning of the factors."""
    selecting = options["keeping_epochs"] + options["pruning_epochs"]
    first = Stage("bases", prepare, selecting, warmup=0.03, schedule="cosine-to-tenth", patient=False)
    if not options["post_epochs"]:
        return (first,)
    return (first, Stage("factors", prepare_factors, options["post_epochs"], warmup=0.03, schedule="cosine"))


def prepare(context: Context) -> Prepared:
    """Put bases in place of the target layers, and drop them during training.

    A layer whose weight is zero has no basis to rank and stays as it is, outside of every budget.

    Raises:
        ParedError: no layer has a basis.
    """
    model, options = context.model, context.options
    names, classes = covered(model, str(options["skip"])), {}
    layers: dict[str, BasisLinear] = {}
    generator = torch.Generator().manual_seed(context.tuning.seed)
    model.requires_grad_(True)

    def put(name: str, bases: Bases) -> None:
        if not bases.any:
            return
        old = model.get_submodule(name)
        classes[name], held = type(old), getattr(torch, options["bases"])
        layers[name] = BasisLinear(weight_of(old), bias_of(old), options["new"], held, generator, bases)
        replace_module(model, name, layers[name])
        layers[name].w.requires_grad_(bool(options["relearn"]))

    decomposed(context, names, str(options["basis"]), put)
    if not layers:
        raise ParedError(f"the weights of all {len(names)} target layers are zero: there is no basis to keep or drop")
    zero = [name for name in names if name not in layers]
    cast_trainable_to_float32(model)
    weights = {name: Weight(layer.out_features, layer.in_features, options["new"]) for name, layer in layers.items()}
    share = _share(layers, weights, options)
    prune = _prune(context, layers, weights, share)
    penalty = L1(layers, options["l1"], _first_of_pruning(context)) if options["l1"] else None

    def finish() -> PreTrainedModel:
        if options["keep"]:
            prune.meet(math.floor(options["keep"] * sum(weight.dense for weight in weights.values())))
        elif penalty:
            prune.meet_mass()
        ready.reached.update(prune.reached())
        ready.notes.extend(prune.shortfalls())
        if zero:
            named = f"{', '.join(zero[:3])}{', ...' if zero[3:] else ''}"
            ready.notes.append(f"the weight of {named} is zero and has no bases: {len(zero)} of {len(names)} layers "
                               "stay dense, and count in no budget")  # fmt: skip
        stored = 0
        for name in layers:
            decision, weight = put_back(model, name, classes[name]), weights[name]
            stored += weight.factors(decision.rank) if isinstance(decision, LowRank) else weight.dense
        ready.reached.update(parameters_before=sum(weight.dense for weight in weights.values()), parameters=stored)
        return model

    callbacks: list[TrainerCallback] = [prune, *([penalty] if penalty else [])]
    faster = {".w": options["coefficient_rate"]} if options["coefficient_rate"] != 1 else {}
    rate = rate_factor(max(share, LEAST_MASS), options["keeping_epochs"], options["pruning_epochs"])
    changing = tuple(f"{name}.{buffer}" for name in layers for buffer in ("mask", "mass"))
    loss = penalty.loss if penalty else own_loss
    ready = Prepared(model, finish, loss, callbacks, buffers=changing, rate=rate, faster=faster)
    return ready


def prepare_factors(context: Context) -> Prepared:
    """Train everything there is."""
    model = context.model
    model.requires_grad_(True)
    cast_trainable_to_float32(model)
    kept = context.options["keep"] or context.options["keep_ratio"]
    return Prepared(model, finish=lambda: model, rate=math.sqrt(1 / kept))


def covered(model: nn.Module, skip: str) -> list[str]:
    """Return the names of the layers that are taken apart: those inside the blocks, but for patterns to skip.

    Raises:
        ParedError: none is left.
    """
    patterns = [pattern for pattern in skip.split(",") if pattern]
    names = [site.name for site in find_anatomy(model).sites]
    left = [name for name in names if not any(fnmatchcase(name, pattern) for pattern in patterns)]
    if not left:
        raise ParedError(f"skip {skip!r} leaves none of the {len(names)} layers to take apart")
    return left


def _share(layers: Mapping[str, BasisLinear], weights: Mapping[str, Weight], options: Mapping[str, Any]) -> float:
    """Return K, with a budget of numbers the one that meets it by the spectra as they are.

    Raises:
        ParedError: new bases alone are more.
    """
    if not options["keep"]:
        return float(options["keep_ratio"])
    numbers = math.floor(options["keep"] * sum(weight.dense for weight in weights.values()))
    try:
        return max(1e-6, share_for({name: layer.coefficients for name, layer in layers.items()}, weights, numbers))
    except ValueError as error:
        raise ParedError(f"keep {options['keep']:g}: {error} ({option_called('new', '8')})") from None


def _first_of_pruning(context: Context) -> int:
    """Return the step the pruning phase begins with, counted from 0."""
    keeping, pruning = context.options["keeping_epochs"], context.options["pruning_epochs"]
    return round(keeping / (keeping + pruning) * context.steps)


def _prune(context: Context, layers: Mapping[str, BasisLinear], weights: Mapping[str, Weight], share: float) -> Prune:
    options, train = context.options, context.examples.train
    rows = train[:: max(1, len(train) // context.tuning.batch)][: context.tuning.batch]  # from all over the data

    def loss_of(row: Row) -> BatchLoss:
        batch = {name: value.to(context.device) for name, value in collate([row]).items()}

        def loss(model: nn.Module) -> torch.Tensor:
            with mixed_precision(context.device, context.precision):
                return own_loss(model, batch)

        return loss

    try:
        steps = prune_steps(context.steps, _first_of_pruning(context), options["prunes"])
    except ValueError as error:
        raise ParedError(f"method basel: {error}") from None
    dense = sum(weight.dense for weight in weights.values())
    return Prune(
        layers,
        weights,
        () if options["l1"] else steps,
        share=share,
        sizes=falling(dense, options["keep"], options["prunes"]) if options["keep"] else None,
        importance=options["importance"],
        probes=options["probes"],
        losses=tuple(loss_of(row) for row in rows),
        model=context.model,
    )
