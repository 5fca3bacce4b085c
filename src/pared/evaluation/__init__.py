"""What a model is worth, dense or compressed."""

from pared.evaluation.classification import Score, classify
from pared.evaluation.generation import Sampling, complete, greedy
from pared.evaluation.perplexity import Perplexity, perplexity
from pared.evaluation.tasks import TASKS, Result, Task, evaluate_task, task_of

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
