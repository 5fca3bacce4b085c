"""What a model is worth, dense or compressed."""

from typing import TYPE_CHECKING

from pared.lazy import lazy_package

if TYPE_CHECKING:
    from pared.evaluation.classification import Score, classify
    from pared.evaluation.generation import Sampling, complete, greedy
    from pared.evaluation.judging import Result, evaluate_task
    from pared.evaluation.perplexity import Perplexity, perplexity
    from pared.evaluation.task import Task
    from pared.evaluation.tasks import TASKS, task_of

__all__ = [
    "TASKS",
    "Perplexity",
    "Result",
    "Sampling",
    "Score",
    "Task",
    "classify",
    "complete",
    "evaluate_task",
    "greedy",
    "perplexity",
    "task_of",
]

lazy_package(
    __name__,
    {
        "pared.evaluation.classification": ["Score", "classify"],
        "pared.evaluation.generation": ["Sampling", "complete", "greedy"],
        "pared.evaluation.perplexity": ["Perplexity", "perplexity"],
        "pared.evaluation.judging": ["Result", "evaluate_task"],
        "pared.evaluation.task": ["Task"],
        "pared.evaluation.tasks": ["TASKS", "task_of"],
    },
)
