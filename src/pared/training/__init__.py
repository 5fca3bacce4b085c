"""Training of what pared made: recovery by adapters, all factors or distillation; zeros that stay zeros."""

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
