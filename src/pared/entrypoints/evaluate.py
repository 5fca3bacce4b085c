"""What a model is worth: its perplexity, the tasks it does, what it gets right of labelled examples."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pared.arguments import require_model, require_tokenizer
from pared.data.evaluated import evaluation_windows
from pared.data.handed import text_of
from pared.data.texts import handed_over
from pared.entrypoints.checks import require_evaluable
from pared.entrypoints.evaluation.against import differences, in_words, require_comparable
from pared.entrypoints.evaluation.evaluating import Evaluating
from pared.entrypoints.evaluation.kept_results import Kept, is_results, read_results
from pared.errors import ParedError
from pared.evaluation import Perplexity
from pared.evaluation import perplexity as measure
from pared.models.loaded import LoadedModel
from pared.progress import Progress, Silent
from pared.schema.evaluate import EvaluationConfig
from pared.schema.recipe import Evaluation

if TYPE_CHECKING:
    from datasets import Dataset

BY_NAME = ("vqa", "fine_tune")  # measures that load more than a model and its tokenizer


def perplexity(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: "str | Path | Sequence[str] | Dataset" = "embedded",
    length: int | None = None,
    windows: int | None = 20,
    bos: Literal["none", "text", "window"] = "none",
) -> Perplexity:
    """Measure the perplexity of a loaded model on a text.

    The whole split is joined and tokenised once, cut into windows that do not overlap, and the nats of every
    predicted token are summed.

    Args:
        model: a causal language model, dense or compressed.
        tokenizer: of the model.
        text: a text by name (``embedded`` means its evaluation part), a list of strings, or a ``datasets.Dataset`` with
            a ``text`` in every row.
        length: tokens in a window; 1024, or what model and text allow if that is less.
        windows: how many from the start; None means all.
        bos: where a beginning-of-sequence token is put.

    Raises:
        ParedError: the text is unknown or too short, or the model's loss is not a number.

    Example:
        >>> pared.perplexity(model, tokenizer, "wikitext2:test", windows=20).value  # doctest: +SKIP
    """
    require_model(model, "pared.perplexity")
    require_tokenizer(tokenizer, "pared.perplexity")
    named = {} if length is None else {"length": length}
    handed = None if text is None or isinstance(text, (str, Path)) else text_of(text, tokenizer, "pared.perplexity")
    asked = Evaluation(text=text if handed is None else handed.name, windows=windows, bos=bos, **named)
    with handed_over(handed):
        return measure(model, tokenizer, evaluation_windows(asked, tokenizer, model.config), asked.bos)


def evaluate(
    model: str | LoadedModel,
    config: EvaluationConfig,
    progress: Progress | None = None,
    tell: Callable[[str], object] = lambda _: None,
    kept: Kept | None = None,
) -> dict[str, Any]:
    """Measure a model.

    Args:
        model: a folder that pared made, any named model, or one that is loaded.
        config: what is measured, and how.
        progress: what reports progress; nothing by default.
        tell: receives each result in words, as it comes.
        kept: results of an earlier run of several tasks, which are not measured again; is given the new ones.

    Returns:
        The figures and what they depend on, as JSON has them.

    Raises:
        ParedError: anything that does not work; what can be refused is refused before a weight is read.
    """
    require_evaluable(model if isinstance(model, str) else None, config)
    if not isinstance(model, str) and config.measure in BY_NAME:
        raise ParedError(f"{config.measure} needs files beside the weights: give the model by name")
    progress, kept = progress or Silent(), kept or Kept(None)
    if config.against is None:
        return _measured(model, config, progress, tell, kept)
    earlier = read_results(config.against) if is_results(config.against) else None
    if earlier is not None:
        require_comparable(config, earlier)
    alone = config.model_copy(update={"against": None})
    found = _measured(model, alone, progress, tell, kept)
    if earlier is None:
        tell(f"against {config.against}:")
        measured = _measured(config.against, alone, progress, tell, kept.of_other())
        earlier = {"model": config.against, **measured}
    named = {"model": model if isinstance(model, str) else model.name, **found}
    compared = differences(named, earlier)
    for one in compared:
        tell(in_words(one))
    return {**found, "differences": compared, "against": earlier}


def _measured(
    model: str | LoadedModel, config: EvaluationConfig, progress: Progress, tell: Callable[[str], object], kept: Kept
) -> dict[str, Any]:
    job = Evaluating(model, config, progress, tell, kept)
    measures: dict[str, Callable[[], dict[str, Any]]] = {
        "perplexity": job.perplexity,
        "examples": job.examples,
        "tasks": job.tasks,
        "perplexity and tasks": job.perplexity_and_tasks,
        "vqa": job.vqa,
        "fine_tune": job.fine_tune,
    }
    return measures[config.measure]()
