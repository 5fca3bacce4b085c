"""Where the weights are: blocks, sites, which sites read the same input, and what is not covered."""

from pared.structure.linear import bias_of, weight_of
from pared.structure.model import Anatomy, Site, find_anatomy, find_blocks
from pared.structure.probe import probe

__all__ = ["Anatomy", "Site", "bias_of", "find_anatomy", "find_blocks", "probe", "weight_of"]
