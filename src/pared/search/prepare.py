"""From a model and a recipe to what candidates are tried on."""

from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pared.data.windows import Windows
from pared.engine.allocate import anatomy_of
from pared.engine.checks.weights import require_finite_weights
from pared.engine.observe import Observer
from pared.engine.spec import CompressionSpec, LowRankSpec, SparseSpec
from pared.errors import ParedError
from pared.progress import Progress
from pared.search.evidence import energies, kept
from pared.search.objective import Trial
from pared.search.ranks import RanksTrial, decompositions
from pared.search.zeros import ZerosTrial
from pared.structure.store import ResidentBlocks


def prepare(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    spec: CompressionSpec,
    windows: Windows,
    folder: Path,
    progress: Progress,
) -> Trial:
    """Collect what programs read, or read what was collected before, and make candidates quick to try.

    Args:
        model: dense.
        tokenizer: of the model.
        spec: of a pruner or a low-rank method.
        windows: what is calibrated on.
        folder: of the search, where what was collected is kept.
        progress: what reports progress.

    Raises:
        ParedError: a weight or a statistic is not finite, or no token reached any site.
    """
    anatomy = anatomy_of(model, spec.recipe)
    require_finite_weights(model, anatomy)
    observer = Observer(ResidentBlocks(model, anatomy), tokenizer, spec, progress)
    observer.probe(anatomy)
    observer.read(windows)
    collect = decompositions if isinstance(spec, LowRankSpec) else energies
    found = kept(folder, lambda: collect(observer))
    if not found:
        raise ParedError("nothing is known about the inputs of any site; use more calibration text")
    if isinstance(spec, LowRankSpec):
        return RanksTrial(model, observer.anatomy, found, spec.budget)
    assert isinstance(spec, SparseSpec), "experts are refused"
    return ZerosTrial(model, observer.anatomy, found, spec.method, spec.config, spec.sparsity)
