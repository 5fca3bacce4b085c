"""Tasks in which a model chooses, scored by lm-evaluation-harness."""

from typing import TYPE_CHECKING

from pared.lazy import lazy_package

if TYPE_CHECKING:
    from pared.evaluation.multiple_choice.scoring import CHOICES, Prepared, evaluate_choices, prepare

__all__ = ["CHOICES", "Prepared", "evaluate_choices", "prepare"]

lazy_package(
    __name__,
    {
        "pared.evaluation.multiple_choice.scoring": ["CHOICES", "Prepared", "evaluate_choices", "prepare"],
    },
)
