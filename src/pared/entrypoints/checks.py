"""What is refused before torch is imported, and what can be said without it; every command asks here first."""

from collections.abc import Callable
from typing import TYPE_CHECKING

from pared.data.files import require_there
from pared.data.labelled import parts_of_task, require_examples
from pared.data.texts import require_text
from pared.environment import require_device, require_dtype
from pared.evaluation import TASKS
from pared.evaluation.multiple_choice import CHOICES
from pared.evaluation.protocols import protocol_of
from pared.io.files import path_of
from pared.models.source import find_model
from pared.names import require_known

if TYPE_CHECKING:
    from pared.schema.evaluate import EvaluationConfig


def task_names() -> list[str]:
    """Return the names of all tasks: first those in which a model chooses, then those in which it writes."""
    return [*CHOICES, *TASKS]


def require_evaluable(model: str | None, config: "EvaluationConfig") -> None:
    """Refuse what cannot be measured.

    Args:
        model: by name; none for one that is loaded.
        config: what is to be measured of it.

    Raises:
        ParedError: an unknown device, dtype, protocol, text, task or set of examples, a file that is not there, or no
            model of that name.
    """
    require_device(config.device)
    require_dtype(config.dtype)
    if config.protocol is not None:
        protocol_of(config.protocol)
    checks: dict[str, Callable[[str], object]] = {
        "perplexity": require_text,
        "examples": require_examples,
        "tasks": lambda name: require_known("task", name, task_names()),
        "vqa": lambda name: require_there(path_of(name), "file of questions"),
        "fine_tune": parts_of_task,
    }
    named = getattr(config, config.measure)
    for name in [named] if isinstance(named, str) else named:
        checks[config.measure](name)
    if model is not None:
        find_model(model)
