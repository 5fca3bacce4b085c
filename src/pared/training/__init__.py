"""Training of what pared made: recovery by adapters, all factors or distillation; zeros that stay zeros."""

from typing import TYPE_CHECKING

from pared.lazy import lazy_package

if TYPE_CHECKING:
    from pared.training.job import Tuned, tune
    from pared.training.keep_zeros import KeepZeros
    from pared.training.merge import merge_lora_keeping_zeros
    from pared.training.methods import METHODS
    from pared.training.pruned import pruned_layers, zeros_of
    from pared.training.stage import TuningMethod

__all__ = [
    "METHODS",
    "KeepZeros",
    "Tuned",
    "TuningMethod",
    "merge_lora_keeping_zeros",
    "pruned_layers",
    "tune",
    "zeros_of",
]

lazy_package(
    __name__,
    {
        "pared.training.job": ["Tuned", "tune"],
        "pared.training.keep_zeros": ["KeepZeros"],
        "pared.training.merge": ["merge_lora_keeping_zeros"],
        "pared.training.methods": ["METHODS"],
        "pared.training.pruned": ["pruned_layers", "zeros_of"],
        "pared.training.stage": ["TuningMethod"],
    },
)
