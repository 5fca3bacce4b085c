"""From what the last block outputs through a model's own head and loss, and back: a part of the tokens at a time."""

import inspect
from collections.abc import Mapping, Sequence

import torch
from transformers import PreTrainedModel

from pared.calibration.activations import replaced_output
from pared.calibration.labels import Labels, logit_gradient
from pared.errors import ParedError
from pared.structure.model import Anatomy
from pared.structure.probe import BlockCall, call_model

LOGITS = 2**23  # that a head computes at once, about: 32 MiB in float32


def through_head(
    model: PreTrainedModel,
    anatomy: Anatomy,
    calls: list[BlockCall],
    hidden_BTH: torch.Tensor,
    tokens_BT: torch.Tensor,
    beside: Mapping[str, torch.Tensor],
    window: int,
    labels: Sequence[Labels],
    clip: float = 0.0,
) -> torch.Tensor:
    """Return the gradient of the loss with respect to the last block's output, ``(draws · windows, tokens, width)``.

    Of several draws of labels those of the first come first; the logits are computed once for all.

    One window at a time. Of a large vocabulary the logits of a window take more memory than many a model's blocks:
    those of a part of the tokens are computed at a time, where the model's own code can be told which. The parts depend
    on shapes alone.

    Args:
        model: whose head and loss these are.
        anatomy: of it.
        calls: of its blocks in this batch.
        hidden_BTH: what the last of them outputs.
        tokens_BT: the windows of the batch.
        beside: what else the model is given, as for :func:`pared.structure.probe.call_model`.
        window: number of the first window.
        labels: where the labels come from, of every draw.
        clip: as for :func:`clipped`.

    Raises:
        ParedError: the model has no head that predicts classes, or the labels do not fit.
    """
    blocks, leaf = anatomy.blocks(model), hidden_BTH[:0]
    gradients: list[list[torch.Tensor]] = [[] for _ in labels]
    with (
        torch.enable_grad(),
        replaced_output(blocks, calls, lambda own: leaf.to(own), anatomy.block_name),
    ):
        for offset, tokens_T in enumerate(tokens_BT):
            more = {name: tensor[offset : offset + 1] for name, tensor in beside.items()}
            mask = more.get("attention_mask")
            mask_T = None if mask is None else mask[0].bool()
            totals: list[torch.Tensor] = []
            for rows in _parts(model, len(tokens_T)):
                leaf = hidden_BTH[offset : offset + 1].detach().requires_grad_()
                kept = {} if rows is None else {"logits_to_keep": torch.arange(rows.start, rows.stop)}
                logits = _logits(model, tokens_T.unsqueeze(0), {**more, **kept})
                for draw, own in enumerate(labels):
                    gradient = logit_gradient(logits, window + offset, tokens_T, own, mask_T, rows)
                    (found,) = torch.autograd.grad(logits, leaf, gradient, retain_graph=draw < len(labels) - 1)
                    if len(totals) == draw:
                        totals.append(found)
                    else:
                        totals[draw].add_(found)  # a part leaves the other tokens at zero
            for one, total in zip(gradients, totals, strict=True):
                one.append(clipped(total, clip))
    return torch.cat([total for one in gradients for total in one])


def clipped(gradient_1TH: torch.Tensor, clip: float) -> torch.Tensor:
    """Return the gradient of a window, none of its tokens' longer than a number of times the median of them.

    A token whose label was unlikely has a gradient many times as long as others, and second moments are made of its
    square. Tokens without a gradient (padding, or no label) are not counted.

    Args:
        gradient_1TH: of one window.
        clip: how many times the median length; 0 for no limit, which gives the very tensor.
    """
    if not clip:
        return gradient_1TH
    length_1T1 = torch.linalg.vector_norm(gradient_1TH, dim=-1, keepdim=True, dtype=torch.float32)
    there = length_1T1[length_1T1 > 0]
    if not len(there):
        return gradient_1TH
    limit = clip * there.median()
    return (gradient_1TH * (limit / length_1T1).clamp(max=1).nan_to_num(nan=1.0)).to(gradient_1TH.dtype)


def _parts(model: PreTrainedModel, tokens: int) -> list[range] | list[None]:
    """Return which tokens of a window go through the head together; None for all at once."""
    vocabulary = int(getattr(model.config.get_text_config(), "vocab_size", 1))
    size = max(1, LOGITS // vocabulary)
    takes = inspect.signature(model.forward).parameters.get("logits_to_keep")
    if tokens <= size or takes is None or "Tensor" not in str(takes.annotation):
        return [None]
    return [range(start, min(start + size, tokens)) for start in range(0, tokens, size)]


def _logits(model: PreTrainedModel, tokens: torch.Tensor, more: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Return what the head outputs."""
    logits: torch.Tensor | None = getattr(call_model(model, tokens, more), "logits", None)
    if logits is None:
        raise ParedError(
            f"{type(model).__name__} outputs no logits, and gradients need a language-model or classification head; "
            "take a method that needs none: svd-llm, basis-sharing, wanda"
        )
    return logits
