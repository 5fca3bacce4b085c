"""Training of what pared made: pruned weights stay pruned, in the Trainer and when adapters are merged."""

from pared.training.keep_zeros import KeepZeros
from pared.training.merge import merge_lora_keeping_zeros
from pared.training.pruned import pruned_layers, zeros_of

__all__ = ["KeepZeros", "merge_lora_keeping_zeros", "pruned_layers", "zeros_of"]
