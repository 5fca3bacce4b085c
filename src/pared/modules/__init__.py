"""What stands where a linear layer stood."""

from pared.modules.low_rank import LowRankLinear

__all__ = ["LowRankLinear"]
