"""Perplexity by the standard protocol: windows that do not overlap, nats summed over every predicted token."""

import math
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from torch.nn import functional
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pared.calibration.spool import ActivationMemory
from pared.calibration.staged import Blocks, run_staged
from pared.data.windows import Windows, require_fits
from pared.errors import ParedError
from pared.models.architecture import is_causal
from pared.tables import Shown, Table

PIECE = 64  # tokens whose log-probabilities are in memory at a time


@dataclass(frozen=True, repr=False)
class Perplexity(Shown):
    """A perplexity and what it was measured on; shown as a table.

    Attributes:
        value: ``exp(nats / predicted)``, or of the mean of the windows' own means.
        nats: summed negative log-likelihood.
        predicted: number of predicted tokens; the first token of a window is never predicted.
        windows: description of the windows, with the digest of their tokens.
        by_window: nats and predicted tokens of every window; where every window counts the same, of one token of it.
    """

    value: float
    nats: float
    predicted: int
    windows: dict[str, object]
    by_window: tuple[tuple[float, int], ...] = ()

    def table(self) -> Table:
        """Return the value with the text, its windows and the predicted tokens."""
        on = self.windows
        rows = [
            ("perplexity", f"{self.value:,.4f}"),
            ("windows", f"{on['windows']:,} of {on['length']:,} tokens"),
            ("predicted tokens", f"{self.predicted:,}"),
            ("nats", f"{self.nats:,.2f}"),
        ]
        stand_in = ["the text only stands in for a real corpus"] if on["stand_in"] else []
        return Table(f"perplexity on {on['text']}", ("", ""), rows, stand_in)


def bos_token(
    windows: Windows, tokenizer: PreTrainedTokenizerBase, bos: Literal["none", "text", "window"]
) -> int | None:
    """Return the id of the token that is put before every window or the text, None for neither.

    Raises:
        ParedError: one is asked for and the tokenizer has none.
    """
    if bos == "none":
        return None
    if tokenizer.bos_token_id is None:
        raise ParedError(
            f"bos {bos!r} for text {windows.text!r}: this tokenizer has no beginning-of-sequence token; use 'none'"
        )
    return int(tokenizer.bos_token_id)


def with_bos(
    windows: Windows, tokenizer: PreTrainedTokenizerBase, bos: Literal["none", "text", "window"]
) -> torch.Tensor:
    """Return the tokens ``(windows, length)``, a beginning-of-sequence token taking the place of the last token.

    ``window`` puts one before every window, ``text`` only before the first.
    """
    token = bos_token(windows, tokenizer, bos)
    if token is None:
        return windows.tokens
    tokens = windows.tokens.clone()
    rows = slice(None) if bos == "window" else slice(0, 1)
    tokens[rows, 1:] = windows.tokens[rows, :-1]
    tokens[rows, 0] = token
    return tokens


@torch.no_grad()
def perplexity(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    windows: Windows,
    bos: Literal["none", "text", "window"] = "none",
    on_window: Callable[[], None] = lambda: None,
    averaging: Literal["token", "window"] = "token",
    fresh: int | None = None,
    store: Blocks | None = None,
    memory: ActivationMemory | None = None,
) -> Perplexity:
    """Measure perplexity, each window on its own.

    Args:
        model: a causal language model, dense or compressed; unchanged.
        tokenizer: of the model.
        windows: the text, cut.
        bos: where a beginning-of-sequence token is put.
        on_window: called after every window.
        averaging: every predicted token counts the same, or every window.
        fresh: of windows that overlap, how many tokens at the end of each are counted; the first counts whole. None
            counts all.
        store: of the model, where its blocks are not in memory: all windows go through one block before the next.
        memory: what the hidden states of all windows share then.

    Raises:
        ParedError: the model gives a loss that is not a number; names the window.
    """
    architecture = type(model.get_base_model() if hasattr(model, "get_base_model") else model).__name__
    if not is_causal([architecture]):
        raise ParedError(f"{architecture} is not a causal language model; perplexity is defined for those only")
    require_fits(model.config, windows)
    tokens = with_bos(windows, tokenizer, bos)
    device = model.get_input_embeddings().weight.device
    if device.type == "meta":
        raise ParedError(f"{architecture} is on the meta device and holds no values; load it with its weights")
    was_training = model.training
    nats: list[float] = []
    predicted: list[int] = []
    lengths = [tokens.shape[1]] * len(tokens) if windows.mask is None else windows.mask.sum(dim=1).tolist()
    try:
        model.eval()
        windows_1T = [window_T[: lengths[number]].unsqueeze(0).to(device) for number, window_T in enumerate(tokens)]
        outputs = _outputs(model, windows_1T, store, memory)
        for number, ids_1T in enumerate(windows_1T):
            output = next(outputs)
            counted = slice(-fresh, None) if fresh is not None and number else slice(None)
            logits_TV = output.logits[0, :-1][counted].float()
            del output
            aims_T = ids_1T[0, 1:][counted]
            loss = summed_nats(logits_TV, aims_T)
            del logits_TV  # there is room for those of one window
            if not math.isfinite(loss):
                with nullcontext() if store is None else store.running():
                    where = first_non_finite(model, ids_1T)
                raise ParedError(f"window {number} of text {windows.text!r}: the loss is {loss}; {where}")
            nats.append(loss)
            predicted.append(len(aims_T))
            on_window()
    finally:
        model.train(was_training)
    total, count = sum(nats), sum(predicted)
    parts = list(zip(nats, predicted, strict=True))
    if averaging == "window":
        parts = [(one / many, 1) for one, many in parts]
    mean = sum(one for one, _ in parts) / sum(many for _, many in parts)
    value = math.exp(mean) if mean < 700 else math.inf
    return Perplexity(value, total, count, {**windows.describe(), "bos": bos}, tuple(parts))


def summed_nats(logits_TV: torch.Tensor, aims_T: torch.Tensor) -> float:
    """Return the negative log-likelihood of tokens in nats, summed: log-probabilities of `PIECE` tokens at a time.

    Those of a whole window would be as large as its logits, and fresh memory: on virtual machines zeroing it takes
    longer than the sum.
    """
    pieces = (slice(start, start + PIECE) for start in range(0, len(aims_T), PIECE))
    return sum(float(functional.cross_entropy(logits_TV[one], aims_T[one], reduction="sum")) for one in pieces)


def _outputs(
    model: PreTrainedModel, windows_1T: list[torch.Tensor], store: Blocks | None, memory: ActivationMemory | None
) -> Iterator[Any]:
    """Yield what the model outputs for every window, one at a time."""
    inputs = [{"input_ids": ids_1T, "use_cache": False} for ids_1T in windows_1T]
    if store is not None:
        yield from run_staged(store, inputs, memory)
    else:
        for given in inputs:
            yield model(**given)


def first_non_finite(model: PreTrainedModel, ids_1T: torch.Tensor) -> str:
    """Run a window again and say which module first outputs NaN or infinity."""
    found: list[str] = []

    def hook(name: str) -> Callable[..., None]:
        def look(_: nn.Module, __: object, output: object) -> None:
            first = output[0] if isinstance(output, (tuple, list)) and output else output
            if not found and isinstance(first, torch.Tensor) and not bool(first.isfinite().all()):
                found.append(name)

        return look

    handles = [module.register_forward_hook(hook(name)) for name, module in model.named_modules() if name]
    try:
        model(input_ids=ids_1T, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return f"{found[0]} is the first to output NaN or infinity" if found else "the logits overflow"
