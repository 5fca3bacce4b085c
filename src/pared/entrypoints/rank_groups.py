"""The rank-group diagnostic: what a model loses with one tenth of every weight's directions gone, tenth by tenth.

FWSVD (Hsu et al., ICLR 2022, arXiv 2207.00112) calls it a brute-force attack: a decomposition that orders directions
by what they are worth loses much with its first groups and nothing with its last.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch.nn import functional
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pared.calibration import Collected, backward, capture, choose_labels, gradient_accumulators, walk
from pared.data.encoding import cut_examples
from pared.data.evaluated import evaluation_windows
from pared.data.labelled import find_examples
from pared.data.lengths import Length
from pared.data.texts import held_out
from pared.data.windows import NO_LABEL, Windows, require_fits
from pared.engine.checks import require_finite_weights
from pared.engine.solutions import DecompositionStore
from pared.engine.spec import anatomy_of, low_rank_of, options_of
from pared.engine.windows import calibration_windows
from pared.environment import choose_dtype, device_of
from pared.errors import ParedError
from pared.evaluation import perplexity
from pared.lowrank import LowRankMethod
from pared.models.architecture import is_causal
from pared.models.source import require_dense
from pared.progress import Progress, Silent
from pared.schema.recipe import Recipe
from pared.structure import Anatomy, probe, weight_of
from pared.structure.probe import BlockCall, call_model

EXAMPLES = 200  # labelled examples measured unless a recipe says how many
BATCH = 8  # of them in one forward pass

Quality = Mapping[str, float]
Measure = Callable[[], Quality]


@dataclass(frozen=True)
class RankGroup:
    """One group of directions, taken out of every weight.

    Attributes:
        number: 1 has the largest singular values.
        quality: of the model without it: ``perplexity``, or ``loss`` and ``accuracy``.
        error: relative change of all weights together, ``sqrt(Σ ||W - W'||² / Σ ||W||²)``, not weighted.
    """

    number: int
    quality: Quality
    error: float


@dataclass(frozen=True)
class RankGroups:
    """The diagnostic of one method on one model.

    Attributes:
        before: quality of the untouched model.
        groups: one after the other.
        untouched: sites that were left whole because nothing is known about their inputs.
        evaluation: description of what quality was measured on.
        calibration: of what statistics were collected on; none for a method that needs no data.
    """

    before: Quality
    groups: tuple[RankGroup, ...]
    untouched: tuple[str, ...]
    evaluation: dict[str, object]
    calibration: dict[str, object] | None


def rank_groups(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    recipe: Recipe,
    groups: int = 10,
    progress: Progress | None = None,
) -> RankGroups:
    """Take one group of every weight's directions out at a time and measure the model.

    The directions are those of the recipe's method, in its order, in groups as equal as can be. Memory: beside the
    model, and what calibration takes, a copy of the covered weights; decompositions are on disk.

    Args:
        model: dense; the same bits afterwards, whatever happens.
        tokenizer: of the model.
        recipe: method, its options, calibration and evaluation; an evaluation text for a causal language model,
            labelled examples for a classifier. Budget, allocation and storage are not read.
        groups: how many.
        progress: who watches; nobody by default.

    Raises:
        ParedError: anything in the model, the recipe or the data that does not work, or a weight with fewer directions
            than groups.
    """
    progress = progress or Silent()
    require_dense(model.config, model.config.name_or_path or type(model).__name__)
    anatomy = anatomy_of(model, recipe)
    require_finite_weights(model, anatomy)
    _require_directions(anatomy, groups)
    method = low_rank_of(recipe)
    options = options_of(recipe)
    evaluation = _evaluation(model, tokenizer, recipe)
    calibration = _calibration(model, tokenizer, recipe) if method.calibrated else None

    def measure() -> Quality:
        if evaluation.labels is not None:
            return classification(model, evaluation)
        assert recipe.evaluation is not None
        return {"perplexity": perplexity(model, tokenizer, evaluation, recipe.evaluation.bos).value}

    was_training = model.training
    model.eval()
    try:
        with DecompositionStore() as store:
            _decompose(model, anatomy, method, options, calibration, recipe, store, progress)
            dense = {name: model.get_submodule(name).weight.detach().clone() for name in store.spectra}
            if not dense:
                raise ParedError("nothing is known about the inputs of any site; use more calibration data")
            before, found = measure(), list[RankGroup]()
            with progress.stage("rank groups", groups, "group") as advance:
                for number in range(1, groups + 1):
                    with _without_group(model, store, dense, number, groups) as error:
                        found.append(RankGroup(number, measure(), error))
                    advance()
    finally:
        model.train(was_training)
    untouched = tuple(site.name for site in anatomy.sites if site.name not in dense)
    told = None if calibration is None else calibration.describe()
    return RankGroups(before, tuple(found), untouched, evaluation.describe(), told)


@torch.no_grad()
def classification(model: PreTrainedModel, examples: Windows) -> dict[str, float]:
    """Return the mean cross entropy ``loss`` and the ``accuracy`` over everything that has a label.

    Args:
        model: with a classification or token-classification head.
        examples: labelled.

    Raises:
        ParedError: the head predicts no classes, the labels do not fit, there are none, or the loss is not a number.
    """
    assert examples.labels is not None
    loss, right, total = 0.0, 0, 0
    for start in range(0, len(examples.tokens), BATCH):
        part = slice(start, start + BATCH)
        beside = {name: tensor[part] for name, tensor in examples.beside.items()}
        logits = getattr(call_model(model, examples.tokens[part], beside), "logits", None)
        if logits is None or logits.shape[-1] < 2:
            raise ParedError(f"{type(model).__name__} predicts no classes; accuracy needs a classification head")
        labels_R = examples.labels[part].flatten().to(logits.device)
        logits_RC = logits.float().flatten(0, -2)
        if len(labels_R) != len(logits_RC):
            raise ParedError(
                f"labelled examples {examples.text!r}: {len(labels_R)} labels for {len(logits_RC)} predictions of "
                f"{type(model).__name__}; one label an example fits a sequence classification, one a word a token "
                "classification"
            )
        loss += float(functional.cross_entropy(logits_RC, labels_R, reduction="sum", ignore_index=NO_LABEL))
        has_R = labels_R != NO_LABEL
        right += int((logits_RC.argmax(-1) == labels_R)[has_R].sum())
        total += int(has_R.sum())
    if total == 0:
        raise ParedError(f"labelled examples {examples.text!r}: none of the {len(examples.tokens)} has a label")
    if not math.isfinite(loss):
        raise ParedError(f"labelled examples {examples.text!r}: the loss is {loss}")
    return {"loss": loss / total, "accuracy": right / total}


def _require_directions(anatomy: Anatomy, groups: int) -> None:
    if groups < 2:
        raise ParedError(f"expected at least 2 groups, found {groups}")
    least = min(anatomy.sites, key=lambda site: min(site.out_features, site.in_features))
    most = min(least.out_features, least.in_features)
    if groups > most:
        raise ParedError(f"site {least.name} {least.out_features} x {least.in_features} has {most} directions, too few "
                         f"for {groups} groups; ask for fewer groups, or skip it")  # fmt: skip


def _calibration(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, recipe: Recipe) -> Windows:
    windows = calibration_windows(recipe, tokenizer, model.config, is_causal([type(model).__name__]))
    require_fits(model.config, windows)
    return windows


def _evaluation(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, recipe: Recipe) -> Windows:
    asked, data = recipe.evaluation, recipe.calibration.text
    if asked is None:
        raise ParedError("nothing to measure quality on; name a text, or labelled examples for a classifier (--eval)")
    causal = is_causal([type(model).__name__])
    name: str | None = asked.text
    if name == "auto":
        name = held_out(data) if causal else data.removesuffix(":train") + ":dev" if data.endswith(":train") else None
    if name is None:
        raise ParedError(f"{data!r} has no known held-out part; name what to measure quality on (--eval)")
    if causal:
        windows = evaluation_windows(asked, tokenizer, model.config, name)
    else:
        examples = find_examples(name)
        count = asked.windows if "windows" in asked.model_fields_set else min(EXAMPLES, len(examples.rows))
        length = Length.of(asked).within(model.config, "labelled examples")
        windows = cut_examples(examples, tokenizer, model.config, length.tokens, count)
    require_fits(model.config, windows)
    return windows


def _decompose(
    model: PreTrainedModel,
    anatomy: Anatomy,
    method: LowRankMethod,
    options: Mapping[str, object],
    windows: Windows | None,
    recipe: Recipe,
    store: DecompositionStore,
    progress: Progress,
) -> None:
    """Put the decomposition of every site that data reached into the store."""
    anatomy, calls = probe(model, anatomy)
    by_site = _statistics(model, anatomy, calls, method, options, windows, recipe, progress)
    for name, statistics in by_site:
        if any(statistic.tokens == 0 for statistic in statistics.values()):
            continue
        values = {key: statistic.value for key, statistic in statistics.items()}
        weight = weight_of(model.get_submodule(name)).detach()
        try:
            found = method.decompose(weight.to(next(iter(values.values()), weight).device), values, options)
        except (ValueError, RuntimeError) as error:
            raise ParedError(f"site {name}: {error}") from error
        store.put(name, found)


def _statistics(
    model: PreTrainedModel,
    anatomy: Anatomy,
    calls: list[BlockCall],
    method: LowRankMethod,
    options: Mapping[str, object],
    windows: Windows | None,
    recipe: Recipe,
    progress: Progress,
) -> Iterator[tuple[str, Mapping[str, Collected]]]:
    """Yield what the method needs of every site that the probe pass reached."""
    reached = {site.name for site in anatomy.sites if not site.idle}
    if windows is None:
        yield from ((name, {}) for name in sorted(reached))
        return
    asked, device = recipe.calibration, device_of(recipe.device)
    dtype = choose_dtype(asked.dtype, model.dtype, device)
    inputs = capture(model, anatomy, windows.tokens, asked.batch, calls, dtype, device, windows.beside)
    names, blocks = method.gradients(options), anatomy.blocks(model)
    with progress.stage(f"calibrate ({dtype})", len(blocks) * len(inputs.calls), "batch") as advance:
        if names:
            loss: Literal["sampled", "labels"] = "sampled" if options["loss"] == "sampled" else "labels"
            labels = choose_labels(model, loss, asked.seed, windows.labels)
            felt = gradient_accumulators(anatomy, names | method.needs([(1, 1)]), device)
            backward(model, anatomy, inputs, windows.tokens, felt, labels, advance)
            yield from felt.items()
        else:
            for walked in walk(blocks, anatomy, inputs, method.needs, advance):
                yield from ((name, own) for name, own in walked.statistics.items() if name in reached)


@contextmanager
@torch.no_grad()
def _without_group(
    model: PreTrainedModel, store: DecompositionStore, dense: Mapping[str, torch.Tensor], number: int, groups: int
) -> Iterator[float]:
    """Have every weight without one group of its directions for the length of a ``with`` block; give the error.

    With ``L`` the weighting of outputs, if there is one, ``W' = W - L⁻ᵀ U_g U_gᵀ Lᵀ W``.
    """
    removed, whole = 0.0, 0.0
    try:
        for name in dense:
            W_ON = weight_of(model.get_submodule(name))
            found = store.get(name, W_ON.detach())
            start, stop = (len(found.singular_values_R) * edge // groups for edge in (number - 1, number))
            factors = found.factors(stop)  # nested: its first directions are those of any smaller rank
            part_ON = factors.up[:, start:stop] @ factors.down[start:stop]
            removed += float(part_ON.square().sum())
            whole += float(found.W_ON.square().sum())
            W_ON.copy_(found.W_ON - part_ON)
        yield math.sqrt(removed / whole) if whole else 0.0
    finally:
        for name, weight in dense.items():
            model.get_submodule(name).weight.copy_(weight)
