"""How far one model's predictions are from another's, in the memory of one set of logits."""

from typing import Any

import torch

ROWS = 64  # softmaxes at a time: what is made of them stays in a CPU's cache


class _Divergence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, student_TV: torch.Tensor, teacher_TV: torch.Tensor, temperature: float) -> torch.Tensor:
        # The gradient is that of a softmax, (softmax(s) - softmax(t)) · temperature; it is made here, once, as the
        # softmaxes are at hand, and is all that is kept.
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
