"""Basel: bases are weighed anew on a task, and the useless ones go."""

from pared.training.basel.method import check, needs_whole, stages

__all__ = ["check", "needs_whole", "stages"]
