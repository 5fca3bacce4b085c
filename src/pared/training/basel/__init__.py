"""Basel: bases are weighed anew on a task, and the useless ones go."""

from pared.training.basel.method import OPTIONS, check, needs_whole, stages

__all__ = ["OPTIONS", "check", "needs_whole", "stages"]
