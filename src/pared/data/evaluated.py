"""What perplexity is measured on, cut as a recipe asks for it."""

from transformers import PretrainedConfig, PreTrainedTokenizerBase

from pared.data.lengths import Length
from pared.data.texts import find_text
from pared.data.windows import Windows, cut, require_fits
from pared.schema.recipe import Evaluation


def evaluation_windows(
    asked: Evaluation,
    tokenizer: PreTrainedTokenizerBase,
    config: PretrainedConfig,
    name: str | None = None,
    stride: int | None = None,
) -> Windows:
    """Cut the text of an evaluation; a length that is not asked for is what model and text allow.

    Args:
        asked: text, length and number of windows.
        tokenizer: of the model.
        config: of the model.
        name: of the text where ``asked`` leaves it open (``auto``).
        stride: windows begin every so many tokens; None means that they do not overlap.

    Raises:
        ParedError: the text is unknown or too short, or the model has fewer positions than are asked for, or tokens it
            does not know.
    """
    length = Length.of(asked).within(config, "evaluation windows")
    text = find_text(asked.text if name is None else name, evaluation=True, tokenizer=tokenizer)
    windows = cut(text, tokenizer, length, asked.windows, stride=stride)
    require_fits(config, windows)
    return windows
