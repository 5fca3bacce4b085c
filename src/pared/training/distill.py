"""Distillation from the dense parent: its predictions on any text are the targets (Hinton et al., arXiv 1503.02531).

``L = (1 - a) τ² · mean_t KL(teacher_t ‖ student_t) + a · L_text + h · mean_l ‖H_l − Ĥ_l‖² / ‖H_l‖²``, the predictions
at every token t softened by τ; if ``text`` is a > 0 with the model's own loss on the text, and if ``hidden`` is h > 0
with the blocks' outputs. Factors and normalisations train, or adapters on the factors. No labels are needed, and what
the model knows beyond the text is asked for too, as the targets are whole distributions.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from pared.checkpoint import load
from pared.data.windows import NO_LABEL
from pared.errors import ParedError
from pared.io.inputs import found_again
from pared.models.architecture import is_causal
from pared.names import option_called
from pared.training.full import train_part
from pared.training.lora import adapt
from pared.training.method import Batch, Context, Loss, Prepared, Stage

ROWS = 64  # softmaxes at a time: what is made of them stays in a CPU's cache


class _Divergence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, student_TV: torch.Tensor, teacher_TV: torch.Tensor, temperature: float) -> torch.Tensor:
        # The gradient is that of a softmax, (softmax(s) - softmax(t)) · temperature; it is made here, once, as the
        # softmaxes are available, and is all that is kept.
        gradient_TV = torch.empty_like(student_TV)
        total = torch.zeros((), dtype=torch.float64, device=student_TV.device)
        for start in range(0, len(student_TV), ROWS):
            rows = slice(start, start + ROWS)
            student_RV = torch.log_softmax(student_TV[rows].float() / temperature, dim=-1)
            teacher_RV = torch.log_softmax(teacher_TV[rows].float() / temperature, dim=-1)
            share_RV = teacher_RV.exp()
            total += torch.linalg.vecdot(share_RV, teacher_RV.sub_(student_RV)).sum(dtype=torch.float64)
            gradient_TV[rows] = student_RV.exp_().sub_(share_RV)
        ctx.save_for_backward(gradient_TV)
        ctx.scale = temperature / max(1, len(student_TV))
        return (total * temperature**2 / max(1, len(student_TV))).float()

    @staticmethod
    def backward(ctx: Any, *upstream: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (gradient_TV,) = ctx.saved_tensors
        return gradient_TV * (upstream[0] * ctx.scale).to(gradient_TV.dtype), None, None


def divergence(student_TV: torch.Tensor, teacher_TV: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """Return ``τ² · mean KL(softmax(teacher / τ) ‖ softmax(student / τ))`` over rows, a float32 scalar.

    The square keeps gradients of the same size for every temperature (Hinton et al., 2015, arXiv 1503.02531).

    Args:
        student_TV: logits ``(tokens, vocabulary)``; the gradient goes here.
        teacher_TV: logits of the same shape, any floating dtype.
        temperature: τ, more than 0.

    Raises:
        ValueError: the shapes differ.
    """
    if student_TV.shape != teacher_TV.shape or student_TV.ndim != 2:
        raise ValueError(f"logits {tuple(student_TV.shape)} and {tuple(teacher_TV.shape)}: expected (tokens, "
                         "vocabulary) of both")  # fmt: skip
    result: torch.Tensor = _Divergence.apply(student_TV, teacher_TV.detach(), temperature)  # type: ignore[no-untyped-call]
    return result


PARENT = "parent"
ALPHA = 4  # times the rank, as of lora


def stages(_: Mapping[str, Any]) -> tuple[Stage, ...]:
    """Return the one stage."""
    return (Stage("distill", prepare, warmup=0.03, schedule="cosine"),)


def prepare(context: Context) -> Prepared:
    """Train factors and normalisations, or adapters, towards the teacher, which shares what is frozen in both."""
    teacher = _teacher(context)
    loss, rank = distillation_loss(teacher, context.options), int(context.options["adapters"])
    prepared = adapt(context, rank, ALPHA * rank, loss=loss) if rank else train_part(context, loss, "factors+norms")
    share_frozen(context.model, teacher)
    return prepared


def distillation_loss(teacher: PreTrainedModel, options: Mapping[str, Any]) -> Loss:
    """Return the loss of a batch against a teacher, which is evaluated without gradients."""
    temperature, hidden, text = (float(options[name]) for name in ("temperature", "hidden", "text"))
    causal = is_causal([type(teacher).__name__])

    def loss(student: Any, batch: Batch) -> torch.Tensor:
        inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
        wanted = {**inputs, "output_hidden_states": hidden > 0}
        with torch.no_grad():
            target = teacher(**wanted)
        found = student(**wanted, **({"labels": batch["labels"]} if text else {}))
        seen = _seen(batch, causal)
        if found.logits.shape[-1] == 1:  # a score
            result = nn.functional.mse_loss(found.logits.float(), target.logits.float())
        elif found.logits.ndim == 2:  # classes of whole examples
            result = divergence(found.logits, target.logits, temperature)
        else:
            result = divergence(_rows(found.logits, seen), _rows(target.logits, seen), temperature)
        if text:
            result = (1 - text) * result + text * found.loss
        if hidden:
            result = result + hidden * _apart(found.hidden_states[1:], target.hidden_states[1:], seen)
        return result

    return loss


def share_frozen(student: nn.Module, teacher: nn.Module) -> int:
    """Let both models hold one tensor where a frozen parameter has the same values; return the bytes saved."""
    others = dict(teacher.named_parameters())
    saved = 0
    for name, parameter in student.named_parameters():
        other = others.get(name)
        if parameter.requires_grad or other is None or other is parameter or other.shape != parameter.shape:
            continue
        if other.dtype == parameter.dtype and torch.equal(other, parameter):
            other.data = parameter.data
            saved += parameter.numel() * parameter.element_size()
    return saved


def _teacher(context: Context) -> PreTrainedModel:
    name = str(context.options["teacher"])
    if name == PARENT:
        if context.manifest is None:
            raise ParedError(
                f"this model has no dense parent on record; name a teacher: {option_called('teacher', 'MODEL')}"
            )
        name = found_again(context.manifest.model["name"], context.manifest.inputs)
    try:
        teacher = load(name)
    except ParedError as error:
        raise ParedError(f"teacher {name!r}: {error}; name another: {option_called('teacher', 'MODEL')}") from None
    ours, its = (len(model.get_input_embeddings().weight) for model in (context.model, teacher))
    if ours != its:
        raise ParedError(f"teacher {name!r} knows {its} tokens and the model {ours}; name one with the same tokenizer")
    teacher.requires_grad_(False)
    return teacher.to(context.device, torch.float32 if context.precision == torch.float32 else None)


def _seen(batch: Batch, causal: bool) -> torch.Tensor:
    """Return which predictions count, bool ``(B, T)``: none of padding, of instructions those of the answer."""
    real = batch["attention_mask"].bool() if "attention_mask" in batch else torch.ones_like(batch["input_ids"]).bool()
    labels = batch["labels"]
    if not causal or not bool((labels[real] == NO_LABEL).any()):
        return real
    predicts = torch.zeros_like(real)
    predicts[:, :-1] = labels[:, 1:] != NO_LABEL
    return predicts & real


def _rows(values_BTV: torch.Tensor, seen_BT: torch.Tensor) -> torch.Tensor:
    if bool(seen_BT.all()):
        return values_BTV.flatten(0, 1)
    return values_BTV[seen_BT]


def _apart(found: tuple[torch.Tensor, ...], target: tuple[torch.Tensor, ...], seen_BT: torch.Tensor) -> torch.Tensor:
    """Return how far hidden states are from the teacher's, as a share of theirs, the mean over blocks."""
    apart = []
    for ours, its in zip(found, target, strict=True):
        ours_TN, its_TN = _rows(ours, seen_BT).float(), _rows(its, seen_BT).float()
        apart.append((ours_TN - its_TN).square().sum() / its_TN.square().sum().clamp(min=1e-12))
    return torch.stack(apart).mean()
