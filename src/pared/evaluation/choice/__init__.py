"""Tasks in which a model chooses, scored by lm-evaluation-harness."""

from pared.evaluation.choice.scoring import CHOICES, Prepared, evaluate_choices, prepare

__all__ = ["CHOICES", "Prepared", "evaluate_choices", "prepare"]
