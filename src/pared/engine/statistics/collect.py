"""Statistics of a dense model in a folder, collected once for any number of compressions of it."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pared.calibration import BlockStatistics, require_statistics, save_block, statistic_kind
from pared.calibration.cache import begin
from pared.engine.allocate import anatomy_of
from pared.engine.observe import Observer
from pared.engine.spec import LowRankSpec, PassSpec, resolve_low_rank
from pared.engine.targets.opening import experts_opened
from pared.errors import ParedError
from pared.io.digests import model_digest
from pared.lowrank import GradientOptions
from pared.methods import METHODS
from pared.progress import Progress, Silent
from pared.schema.recipe import Recipe
from pared.structure.store import ResidentBlocks


def collect(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    recipe: Recipe,
    names: frozenset[str],
    folder: Path,
    progress: Progress | None = None,
) -> None:
    """Collect statistics once, on disk, for any number of compressions of the same dense model.

    Args:
        model: dense; unchanged.
        tokenizer: of the model.
        recipe: its calibration is read, and the options ``loss``, ``labels_per_token`` and ``gradient_clip`` of its
            method where gradients are among the names.
        names: of statistics of inputs (``gram``, ``mean_gram``, ``magnitude``) and of gradients.
        folder: where one file a block is written; read by :func:`pared.calibration.saved_blocks`.
        progress: what reports progress; nothing by default.

    Raises:
        ParedError: the model or the text does not allow it, or the folder holds statistics of something else.
    """
    spec = resolve_low_rank(recipe)
    with experts_opened(model, spec):
        _collect(model, tokenizer, spec, names, folder, progress)


def _collect(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    spec: LowRankSpec,
    names: frozenset[str],
    folder: Path,
    progress: Progress | None,
) -> None:
    """Collect statistics of a model whose experts are open; see :func:`collect`."""
    recipe = spec.recipe
    anatomy = anatomy_of(model, recipe)
    work = Observer(ResidentBlocks(model, anatomy), tokenizer, spec, progress or Silent())
    require_statistics(names)
    gradients = any(statistic_kind(name).backward for name in names)
    if gradients and (apart := sorted(name for name in names if statistic_kind(name).of == "output")):
        raise ParedError(f"statistic {apart[0]} is of what sites output; collect it apart from gradients")
    if gradients and not isinstance(spec.config, GradientOptions):
        having = [name for name, method in METHODS.available().items() if issubclass(method.config, GradientOptions)]
        raise ParedError(
            f"method {recipe.method} has no option loss, which says whose gradients {', '.join(sorted(names))} are of; "
            f"collect them with a recipe of {' or '.join(having)}"
        )
    summed = sorted(name for name in names if statistic_kind(name).of == "weight_grad")
    if summed and spec.labels_per_token > 1:
        raise ParedError(f"statistic {summed[0]} is of the gradient of a weight, which does not tell draws of labels "
                         f"apart, got labels_per_token {spec.labels_per_token}; collect it with 1")  # fmt: skip
    work.probe(anatomy)
    work.read()
    source = source_of(work, gradients)
    begin(folder, source)
    inputs = work.capture()

    def save(block: BlockStatistics) -> None:
        save_block(folder, replace(block, source=source))

    if gradients:
        work.backward(inputs, names, save, share=1.0)
    else:
        work.forward(inputs, lambda _: names, save, PassSpec("evidence", "forward"), influence=True)


def source_of(observer: Observer, gradients: bool) -> dict[str, Any]:
    """Return what the statistics of an observer that has read its tokens depend on, for their files.

    Args:
        observer: of the dense model.
        gradients: whether some are of a loss.
    """
    store, model, spec = observer.store, observer.model, observer.spec
    assert observer.windows is not None, "nothing was read"
    found = {
        "architecture": type(model).__name__,
        "blocks": len(store),
        "dtype": str(model.dtype).removeprefix("torch."),
        "model": model_digest(model, store.tensors()),
        "tokens": observer.windows.digest,
    }
    if gradients and isinstance(spec, LowRankSpec):
        found["loss"] = spec.loss
        if spec.loss == "sampled":
            found["seed"] = spec.calibration.seed  # of the labels
        found |= {"labels_per_token": spec.labels_per_token, "gradient_clip": spec.gradient_clip}
    return found
