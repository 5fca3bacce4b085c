"""What products are made in, and what is trained is held in."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from pared.environment import choose_dtype
from pared.errors import ParedError


def training_precision(asked: str, stored: torch.dtype, device: torch.device) -> torch.dtype:
    """Return what products are made in: as while calibrating, but never float16, in which small gradients are 0.

    Raises:
        ParedError: float16 was asked for.
    """
    if asked == "float16":
        raise ParedError("in precision float16 most gradients become 0 without scaling; use bfloat16 or float32")
    chosen = choose_dtype(asked, stored, device)
    return torch.bfloat16 if chosen == torch.float16 else chosen


def mixed_precision(device: torch.device, precision: torch.dtype) -> AbstractContextManager[Any]:
    """Return the context in which products are made in this dtype, whatever the weights are held in."""
    return nullcontext() if precision == torch.float32 else torch.autocast(device.type, precision)


def cast_trainable_to_float32(model: nn.Module) -> None:
    """Hold what is trained in float32, in place: the steps of an optimiser are smaller than bfloat16 can add."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
