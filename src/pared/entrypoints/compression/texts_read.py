"""The texts that a compression reads: what it calibrates on, what perplexity is measured on, and what both share."""

from typing import NamedTuple

from transformers import PretrainedConfig, PreTrainedTokenizerBase

from pared.data.evaluated import evaluation_windows
from pared.data.overlap import overlap
from pared.data.texts import learned_part
from pared.data.windows import Windows, require_fits
from pared.engine.spec import CompressionSpec
from pared.engine.windows import calibration_windows, evaluated_text
from pared.errors import TextTooShortError
from pared.names import called
from pared.progress import Progress
from pared.report.table import WORTH_SAYING
from pared.schema.recipe import Recipe


class TextsRead(NamedTuple):
    """The texts of one compression, cut.

    Attributes:
        calibration: what is calibrated on; none for a method that reads nothing.
        evaluation: what perplexity is measured on; none if it is not.
        learned_from: the share of the latter that is calibrated on.
    """

    calibration: Windows | None = None
    evaluation: Windows | None = None
    learned_from: float = 0.0


def read_texts(
    spec: CompressionSpec,
    config: PretrainedConfig,
    causal: bool,
    tokenizer: PreTrainedTokenizerBase,
    progress: Progress,
    calibration: Windows | None = None,
) -> TextsRead:
    """Cut the texts that a recipe names, and say what is not measured, and why.

    Args:
        spec: of the recipe.
        config: of the model.
        causal: whether that is a causal language model.
        tokenizer: of it.
        progress: what reports progress.
        calibration: windows in place of the recipe's text.

    Raises:
        ParedError: a text is unknown or too short, or its windows are longer than the model has positions.
    """
    if calibration is None and spec.calibrated and spec.use:
        progress.note(f"calibrated on {spec.use['calibrate_on']}")
    calibration = calibration or _calibration_windows(spec, config, causal, tokenizer)
    evaluation = _evaluation_windows(spec.recipe, config, causal, tokenizer, calibration, progress)
    return TextsRead(calibration, evaluation, _overlap(evaluation, calibration, progress))


def _calibration_windows(
    spec: CompressionSpec, config: PretrainedConfig, causal: bool, tokenizer: PreTrainedTokenizerBase
) -> Windows | None:
    if not spec.calibrated:
        return None
    windows = calibration_windows(spec.recipe, tokenizer, config, causal)
    require_fits(config, windows)
    return windows


def _evaluation_windows(
    recipe: Recipe,
    config: PretrainedConfig,
    causal: bool,
    tokenizer: PreTrainedTokenizerBase,
    calibration: Windows | None,
    progress: Progress,
) -> Windows | None:
    asked = recipe.evaluation
    if asked is None:
        return None
    if not causal:
        progress.note("no perplexity: this architecture is not a causal language model")
        return None
    name = evaluated_text(recipe)
    if (
        asked.text == "auto"
        and calibration is not None
        and calibration.text != learned_part(recipe.calibration.text, name)
    ):
        name = None  # too short to keep a part apart: all of it is calibrated on
    if name is None:
        progress.note(
            f"no perplexity: {recipe.calibration.text!r} has no held-out part; name another text to measure "
            f"it on ({called('evaluation.text', 'TEXT')})"
        )
        return None
    try:
        windows = evaluation_windows(asked, tokenizer, config, name)
    except TextTooShortError as error:
        if asked.text != "auto" or "length" in asked.model_fields_set:
            raise
        progress.note(f"no perplexity: {error}; name another to measure it on "
                      f"({called('evaluation.text', 'TEXT')})")  # fmt: skip
        return None
    if windows.stand_in:
        progress.note(f"the text {name!r} ({windows.origin}) only stands in for a real corpus")
    return windows


def _overlap(measured: Windows | None, calibrated: Windows | None, progress: Progress) -> float:
    """Return the share of what is measured on that is calibrated on, and say so if it is more than phrases."""
    if measured is None or calibrated is None:
        return 0.0
    seen = overlap(measured, [calibrated.describe()], [calibrated.tokens])
    if seen >= WORTH_SAYING:
        progress.note(
            f"{seen:.0%} of what perplexity is measured on ({measured.text!r}) is calibrated on ({calibrated.text!r}): "
            "it says nothing about text the model has not seen; name another with "
            f"{called('evaluation.text', 'TEXT')}"
        )
    return seen
