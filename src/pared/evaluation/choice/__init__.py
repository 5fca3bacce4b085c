"""Tasks in which a model chooses, scored by lm-evaluation-harness from the files of ``PARED_DATA``."""

from pared.evaluation.choice.scoring import CHOICES, Prepared, evaluate_choices, prepare

__all__ = ["CHOICES", "Prepared", "evaluate_choices", "prepare"]
