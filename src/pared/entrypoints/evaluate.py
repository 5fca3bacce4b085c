"""The Python API: what ``import pared`` gives a notebook."""

from typing import Literal

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pared.arguments import require_model, require_tokenizer
from pared.data.evaluated import evaluation_windows
from pared.evaluation import Perplexity
from pared.evaluation import perplexity as measure
from pared.schema.recipe import Evaluation


def perplexity(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: str = "embedded",
    length: int | None = None,
    windows: int | None = 20,
    bos: Literal["none", "text", "window"] = "none",
) -> Perplexity:
    """Measure the perplexity of a loaded model on a named text.

    The whole split is joined and tokenised once, cut into windows that do not overlap, and the nats of every
    predicted token are summed.

    Args:
        model: a causal language model, dense or compressed.
        tokenizer: of the model.
        text: a text by name; ``embedded`` means its evaluation part.
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
    asked = Evaluation(text=text, windows=windows, bos=bos, **named)
    return measure(model, tokenizer, evaluation_windows(asked, tokenizer, model.config), asked.bos)
