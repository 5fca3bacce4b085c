"""The windows of tokens a recipe asks for: what is calibrated on, and what an allocation tries its proposals on."""

import logging
from dataclasses import replace
from typing import TYPE_CHECKING

from pared.data.lengths import Length
from pared.data.texts import find_text, from_learned_part, held_out
from pared.errors import ParedError
from pared.names import called
from pared.schema.recipe import Recipe

if TYPE_CHECKING:  # what a recipe evaluates on is reported without torch
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from pared.data.windows import Windows
    from pared.engine.spec import CompressionSpec

log = logging.getLogger(__name__)

TRIAL_WINDOWS = 8  # windows kept apart for allocators that try what they propose
LEAST_TO_TRAIN = 2  # windows: one to train on, one to hold out


def windows_to_read(
    spec: "CompressionSpec",
    tokenizer: "PreTrainedTokenizerBase",
    model: "PreTrainedModel",
    windows: "Windows | None" = None,
) -> "Windows":
    """Return these windows, or those of a spec's recipe, once they are known to suit the model and the spec.

    Args:
        spec: of the compression.
        tokenizer: of the model.
        model: that is to read them.
        windows: cut already; None to cut those of the recipe.

    Raises:
        ParedError: the text is unknown or too short, a window is longer than the model can read, or a refinement
            has nothing to train on beside what is held out.
    """
    from pared.data.windows import require_fits
    from pared.models.architecture import is_causal

    causal = is_causal([type(model).__name__])
    found = windows or calibration_windows(spec.recipe, tokenizer, model.config, causal)
    require_fits(model.config, found)
    if spec.refine is not None and (count := len(found.tokens)) < LEAST_TO_TRAIN:
        raise ParedError(
            f"{called('refine', 'True')} trains on some windows and is checked on others, and the calibration text "
            f"gives {count}: raise {called('samples')}, lower {called('length')}, or name a longer text"
        )
    return found


def calibration_windows(
    recipe: Recipe, tokenizer: "PreTrainedTokenizerBase", config: "PretrainedConfig", causal: bool
) -> "Windows":
    """Cut a recipe's calibration text, or its labelled examples.

    Args:
        recipe: whose calibration is read.
        tokenizer: of the model.
        config: of the model; knows its classes.
        causal: whether it is a causal language model, which reads texts only.

    Raises:
        ParedError: the text is unknown, or shorter than one window.
    """
    from pared.data.encoding import find_windows

    asked, length = recipe.calibration, Length.of(recipe.calibration)

    def windows(name: str) -> "Windows":
        return find_windows(name, tokenizer, config, causal, length, asked.samples, asked.sampling, asked.seed)

    return from_learned_part(asked.text, evaluated_text(recipe), windows) if causal else windows(asked.text)


def evaluated_text(recipe: Recipe) -> str | None:
    """Return the name of what perplexity is measured on, the held-out part if that is left open; None for nothing."""
    asked = recipe.evaluation
    if asked is None:
        return None
    return held_out(recipe.calibration.text) if asked.text == "auto" else asked.text


def trial_windows(recipe: Recipe, tokenizer: "PreTrainedTokenizerBase", config: "PretrainedConfig") -> "Windows":
    """Cut the windows that follow those a recipe calibrates on, for allocators that try what they propose.

    A text that has no more of them gives the last that are calibrated on, and says so in the log.

    Raises:
        ParedError: the text is unknown, or shorter than one window.
    """
    from pared.data.windows import cut, digest_of

    asked, length = recipe.calibration, Length.of(recipe.calibration).within(config)
    again = asked.sampling == "random-offset"
    wanted = None if asked.samples is None else asked.samples + TRIAL_WINDOWS
    count, seed = (TRIAL_WINDOWS, asked.seed + 1) if again else (wanted, asked.seed)

    def make(name: str) -> "Windows":
        return cut(find_text(name, tokenizer=tokenizer), tokenizer, length, count, asked.sampling, seed)

    windows = from_learned_part(asked.text, evaluated_text(recipe), make)
    if again:
        return windows
    apart = 0 if asked.samples is None else len(windows.tokens) - asked.samples
    if apart < 1:
        log.warning("text %r has no windows but the calibration windows: trials use the last of those", windows.text)
    last = slice(-(apart if apart > 0 else TRIAL_WINDOWS), None)
    tokens = windows.tokens[last]
    return replace(windows, tokens=tokens, digest=digest_of(tokens), spans=windows.spans[last])
