"""The rank-group diagnostic: what a model loses with one tenth of every weight's directions gone, tenth by tenth.

FWSVD (Hsu et al., ICLR 2022, arXiv 2207.00112) calls it a brute-force attack: a decomposition that orders directions
by what they are worth loses much with its first groups and nothing with its last.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch.nn import functional
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pared.data.encoding import cut_examples
from pared.data.evaluated import evaluation_windows
from pared.data.labelled import find_examples
from pared.data.lengths import Length
from pared.data.texts import held_out
from pared.data.windows import NO_LABEL, Windows, require_fits
from pared.engine.allocate import anatomy_of
from pared.engine.checks.weights import require_finite_weights
from pared.engine.install import patched
from pared.engine.observe import Observer
from pared.engine.ranks.decompose import decompose_sites
from pared.engine.spec import LowRankSpec, resolve_low_rank
from pared.engine.state.solutions import DecompositionStore
from pared.engine.targets.opening import experts_opened
from pared.environment import device_of
from pared.errors import ParedError
from pared.evaluation import perplexity
from pared.models.architecture import is_causal
from pared.models.source import find_model, require_dense
from pared.names import called
from pared.progress import Progress, Silent
from pared.schema.recipe import Recipe
from pared.structure import Anatomy, weight_of
from pared.structure.probe import call_model, evaluating
from pared.structure.store import ResidentBlocks

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


def run(recipe: Recipe, groups: int = 10, progress: Progress | None = None) -> RankGroups:
    """Measure the groups of a model by name; see :func:`rank_groups`."""
    source = find_model(str(recipe.model), recipe.dtype)
    tokenizer = source.tokenizer()
    return rank_groups(source.load(recipe.dtype).to(device_of(recipe.device)), tokenizer, recipe, groups, progress)


def rank_groups(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    recipe: Recipe,
    groups: int = 10,
    progress: Progress | None = None,
) -> RankGroups:
    """Take one group of every weight's directions out at a time and measure the model.

    The directions are those of the recipe's method, in its order, in groups as equal as can be. Memory: beside the
    model, and what calibration takes, a copy of the target weights; decompositions are on disk.

    Args:
        model: dense; the same bits afterwards, whatever happens.
        tokenizer: of the model.
        recipe: method, its options, calibration and evaluation; an evaluation text for a causal language model,
            labelled examples for a classifier. Budget, allocation and storage are not read.
        groups: how many.
        progress: what reports progress; nothing by default.

    Raises:
        ParedError: anything in the model, the recipe or the data that does not work, or a weight with fewer directions
            than groups.
    """
    progress, spec = progress or Silent(), resolve_low_rank(recipe)
    spec.method.require_solve()
    require_dense(model.config, model.config.name_or_path or type(model).__name__)
    with experts_opened(model, spec):
        return _rank_groups(model, tokenizer, spec, groups, progress)


def _rank_groups(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    spec: LowRankSpec,
    groups: int,
    progress: Progress,
) -> RankGroups:
    """Take groups out of a model whose experts are open; see :func:`rank_groups`."""
    recipe = spec.recipe
    anatomy = anatomy_of(model, recipe)
    require_finite_weights(model, anatomy)
    _require_directions(anatomy, groups)
    evaluation = _evaluation(model, tokenizer, recipe)
    observer = Observer(ResidentBlocks(model, anatomy), tokenizer, spec, progress)
    if spec.method_calibrated:
        observer.read()

    def measure() -> Quality:
        if evaluation.labels is not None:
            return classification(model, evaluation)
        assert recipe.evaluation is not None
        return {"perplexity": perplexity(model, tokenizer, evaluation, recipe.evaluation.bos).value}

    with evaluating(model), DecompositionStore() as store:
        observer.probe(anatomy)
        decompose_sites(observer, spec.solving_for_method, store.put)
        if not store.spectra:
            raise ParedError("nothing is known about the inputs of any site; use more calibration data")
        before, found = measure(), list[RankGroup]()
        with progress.stage("rank groups", groups, "group") as advance:
            for number in range(1, groups + 1):
                removal = _Removal(model, store, number, groups)
                with patched(model, removal.weights()):
                    found.append(RankGroup(number, measure(), removal.error))
                advance()
        untouched = tuple(site.name for site in anatomy.sites if site.name not in store.spectra)
    windows = observer.windows
    return RankGroups(
        before, tuple(found), untouched, evaluation.describe(), None if windows is None else windows.describe()
    )


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
        raise ParedError(f"expected at least 2 groups, got {groups}")
    least = min(anatomy.sites, key=lambda site: min(site.out_features, site.in_features))
    most = min(least.out_features, least.in_features)
    if groups > most:
        raise ParedError(f"site {least.name} {least.out_features} x {least.in_features} has {most} directions, too few "
                         f"for {groups} groups; ask for fewer groups, or skip it")  # fmt: skip


def _evaluation(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, recipe: Recipe) -> Windows:
    asked, data = recipe.evaluation, recipe.calibration.text
    if asked is None:
        raise ParedError(f"nothing to measure quality on; name a text, or labelled examples for a classifier "
                         f"({called('evaluation.text')})")  # fmt: skip
    causal = is_causal([type(model).__name__])
    name: str | None = asked.text
    if name == "auto":
        name = held_out(data) if causal else data.removesuffix(":train") + ":dev" if data.endswith(":train") else None
    if name is None:
        raise ParedError(f"{data!r} has no known held-out part; name what to measure quality on "
                         f"({called('evaluation.text')})")  # fmt: skip
    if causal:
        windows = evaluation_windows(asked, tokenizer, model.config, name)
    else:
        examples = find_examples(name)
        count = asked.windows if "windows" in asked.model_fields_set else min(EXAMPLES, len(examples.rows))
        length = Length.of(asked).within(model.config, "labelled examples")
        windows = cut_examples(examples, tokenizer, model.config, length.tokens, count)
    require_fits(model.config, windows)
    return windows


class _Removal:
    """Takes one group of directions out of every weight.

    With ``L`` the weighting of outputs, if there is one, ``W' = W - L⁻ᵀ U_g U_gᵀ Lᵀ W``.
    """

    def __init__(self, model: PreTrainedModel, store: DecompositionStore, number: int, groups: int) -> None:
        self._model, self._store, self._number, self._groups = model, store, number, groups
        self._removed, self._whole = 0.0, 0.0

    def weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield every weight without the group."""
        for name in self._store.spectra:
            found = self._store.get(name, weight_of(self._model.get_submodule(name)).detach())
            count = len(found.singular_values_R)
            start, stop = (count * edge // self._groups for edge in (self._number - 1, self._number))
            factors = found.factors(stop)  # nested: its first directions are those of any smaller rank
            part_ON = factors.up[:, start:stop] @ factors.down[start:stop]
            self._removed += float(part_ON.square().sum())
            self._whole += float(found.W_ON.square().sum())
            yield name, found.W_ON - part_ON

    @property
    def error(self) -> float:
        """The relative change of all weights together, once they were yielded."""
        return math.sqrt(self._removed / self._whole) if self._whole else 0.0
