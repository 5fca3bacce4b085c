"""A linear layer seen as ``weight (out, in)`` and ``bias (out)``, whatever class it is."""

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

LINEAR_TYPES = (nn.Linear, Conv1D)


def weight_of(module: nn.Module) -> torch.Tensor:
    """Return the weight as ``(out, in)``: a view, transposed for ``Conv1D``."""
    assert isinstance(module, LINEAR_TYPES)
    return module.weight.T if isinstance(module, Conv1D) else module.weight


def bias_of(module: nn.Module) -> torch.Tensor | None:
    """Return the bias ``(out,)`` if there is one."""
    assert isinstance(module, LINEAR_TYPES)
    return module.bias
