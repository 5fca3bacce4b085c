"""Training of what pared made: recovery by adapters, all factors or distillation; zeros that stay zeros."""

from typing import TYPE_CHECKING

from pared.lazy import lazy_package

if TYPE_CHECKING:
    from pared.training.masks import KeepZeros, merge_lora_keeping_zeros, pruned_layers, zeros_of
    from pared.training.method import TuningMethod
    from pared.training.registry import METHODS

__all__ = [
    "METHODS",
    "KeepZeros",
    "TuningMethod",
    "merge_lora_keeping_zeros",
    "pruned_layers",
    "zeros_of",
]

lazy_package(
    __name__,
    {
        "pared.training.masks": ["KeepZeros", "merge_lora_keeping_zeros", "pruned_layers", "zeros_of"],
        "pared.training.method": ["TuningMethod"],
        "pared.training.registry": ["METHODS"],
    },
)
