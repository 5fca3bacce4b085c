"""What is refused of a training before anything that takes long is imported or read."""

import importlib.util
from collections.abc import Sequence

from pared.data.instructions import PREFIX as INSTRUCTIONS
from pared.data.instructions import require_instructions
from pared.data.labelled import SETS as LABELLED
from pared.data.labelled import require_examples
from pared.data.templates import templates
from pared.data.texts import require_text
from pared.environment import require_device
from pared.errors import ParedError
from pared.io.files import path_of
from pared.io.inputs import inputs_of
from pared.io.output_dir import require_free
from pared.models.source import find_model
from pared.names import called, require_known
from pared.schema.presets import require_user_fields
from pared.schema.training import TrainingConfig
from pared.training.registry import method_of, settled

# As transformers calls them, and the modules any of which it takes; it alone decides for one without.
TRACKERS: dict[str, tuple[str, ...]] = {
    "azure_ml": ("azureml",),
    "clearml": ("clearml",),
    "codecarbon": ("codecarbon",),
    "comet_ml": ("comet_ml",),
    "dagshub": ("dagshub",),
    "dvclive": ("dvclive",),
    "flyte": ("flytekit",),
    "kubeflow": (),
    "mlflow": ("mlflow",),
    "neptune": ("neptune",),
    "swanlab": ("swanlab",),
    "tensorboard": ("tensorboard", "tensorboardX"),
    "trackio": ("trackio",),
    "wandb": ("wandb",),
}


def require_possible(tuning: TrainingConfig, overwrite: bool) -> None:
    """Refuse what a tuning alone, or the disk, shows to be impossible.

    Args:
        tuning: with ``model`` and ``out``.
        overwrite: whether an output folder that is there may be replaced.

    Raises:
        ParedError: an unknown method, option, template, text, tracker or device, no model of that name, or an
            output that is there.
    """
    method = method_of(tuning.method)
    settled(method, tuning.options)
    require_device(tuning.device)
    require_known("template", tuning.template, templates())
    require_user_fields(tuning)
    require_trackers(tuning.report_to)
    for name in tuning.data:
        require_data(name)
    if tuning.out is None:
        raise ParedError(f"no output folder is named; give {called('out', 'DIR')}, or 'out' in the file")
    require_free(path_of(tuning.out), overwrite, inputs_of(tuning.model_dump()))
    require_named(tuning)
    find_model(str(tuning.model))


def require_named(tuning: TrainingConfig) -> None:
    """Refuse a tuning without a model.

    Raises:
        ParedError: says what may be named.
    """
    if tuning.model is None:
        what = "a dense model" if method_of(tuning.method).compresses else "a folder that pared made"
        raise ParedError(f"no model is named; method {tuning.method} trains {what}")


def require_data(name: str) -> None:
    """Check that a name is one of what can be trained on, without reading it.

    Raises:
        ParedError: nothing of that name; offers the nearest.
    """
    if name.startswith(INSTRUCTIONS):
        require_instructions(name)
    elif name.startswith(LABELLED):
        require_examples(name)
    else:
        require_text(name)


def require_trackers(names: Sequence[str]) -> None:
    """Refuse trackers that transformers does not know, or whose package is not installed.

    Raises:
        ParedError: offers the nearest name, or says what to install.
    """
    for name in names:
        require_known("tracker", name, TRACKERS)
        packages = TRACKERS[name]
        if packages and not any(map(importlib.util.find_spec, packages)):
            raise ParedError(f"tracker {name!r}: its package is not installed; pip install {packages[0]}")
