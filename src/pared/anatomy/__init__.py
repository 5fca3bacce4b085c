"""Where the weights are: blocks, sites, which sites read the same input, and what is not covered."""

from pared.anatomy.linear import bias_of, weight_of
from pared.anatomy.probe import probe
from pared.anatomy.structure import Anatomy, Site, find_anatomy, find_blocks

__all__ = ["Anatomy", "Site", "bias_of", "find_anatomy", "find_blocks", "probe", "weight_of"]
