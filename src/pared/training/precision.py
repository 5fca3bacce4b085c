"""What products are made in, and what is trained is held in."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn


def precise(device: torch.device, precision: torch.dtype) -> AbstractContextManager[Any]:
    """Return the context in which products are made in this dtype, whatever the weights are held in."""
    return nullcontext() if precision == torch.float32 else torch.autocast(device.type, precision)


def hold_in_float32(model: nn.Module) -> None:
    """Hold what is trained in float32, in place: the steps of an optimiser are smaller than bfloat16 can add."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def hold_in(model: nn.Module, dtypes: dict[str, torch.dtype]) -> None:
    """Hold parameters in these dtypes by name, in place."""
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(dtypes.get(name, parameter.dtype))
