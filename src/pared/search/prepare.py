"""From a model and a recipe to what candidates are tried on."""

from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pared.data.windows import Windows
from pared.engine.checks import require_finite_weights
from pared.engine.spec import anatomy_of, budget_of, is_pruning
from pared.errors import ParedError
from pared.progress import Progress
from pared.schema.recipe import Recipe
from pared.search.evidence import energies, kept
from pared.search.objective import Trial
from pared.search.ranks import RanksTrial, decompositions
from pared.search.zeros import ZerosTrial
from pared.structure import probe


def prepare(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    recipe: Recipe,
    windows: Windows,
    folder: Path,
    progress: Progress,
) -> Trial:
    """Collect what programs read, or read what was collected before, and make candidates quick to try.

    Args:
        model: dense.
        tokenizer: of the model.
        recipe: of a pruner or a low-rank method.
        windows: what is calibrated on.
        folder: of the search, where what was collected is kept.
        progress: who watches.

    Raises:
        ParedError: a weight or a statistic is not finite, or no token reached any site.
    """
    anatomy = anatomy_of(model, recipe)
    require_finite_weights(model, anatomy)
    anatomy, calls = probe(model, anatomy)
    collect = energies if is_pruning(recipe) else decompositions
    found = kept(folder, lambda: collect(model, tokenizer, recipe, anatomy, calls, windows, progress))
    if not found:
        raise ParedError("nothing is known about the inputs of any site; use more calibration text")
    if not is_pruning(recipe):
        return RanksTrial(model, anatomy, found, budget_of(recipe))
    assert recipe.sparsity is not None
    return ZerosTrial(model, anatomy, found, recipe.method, recipe.sparsity)
