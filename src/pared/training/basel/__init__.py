"""Basel: bases are weighed anew on a task, and the useless ones go."""

from pared.training.basel.method import needs_whole, stages

__all__ = ["needs_whole", "stages"]
