"""Basel: the importance of bases is relearned on a task, and useless ones are dropped."""

from pared.training.basel.method import needs_whole, stages

__all__ = ["needs_whole", "stages"]
