"""What is refused of a training before anything that takes long is imported or read."""

from pared.engine.asked import checked_options
from pared.errors import ParedError
from pared.files import path_of
from pared.hardware import require_device
from pared.inputs import inputs_of
from pared.names import require_known
from pared.presets import require_user_fields
from pared.sources.labelled import SETS as LABELLED
from pared.sources.models import find_model
from pared.sources.templates import templates
from pared.sources.texts import require_text
from pared.staging import require_free
from pared.training.methods import method_of
from pared.tuning import Tuning

INSTRUCTIONS = "instruct:"


def require_possible(tuning: Tuning, overwrite: bool) -> None:
    """Refuse what a tuning alone, or the disk, shows to be impossible.

    Args:
        tuning: with ``model`` and ``out``.
        overwrite: whether an output folder that is there may be replaced.

    Raises:
        ParedError: an unknown method, option, template, text or device, no such model, or an output that is there.
    """
    method = method_of(tuning.method)
    checked_options(tuning.options, method.options, f"training method {method.name}")
    require_device(tuning.device)
    require_known("template", tuning.template, templates())
    require_user_fields(tuning)
    for name in tuning.data:
        if not name.startswith((INSTRUCTIONS, *LABELLED)):
            require_text(name)
    if tuning.out is None:
        raise ParedError("no output folder is named; give --out DIR, or 'out' in the file")
    require_free(path_of(tuning.out), overwrite, inputs_of(tuning.model_dump()))
    if tuning.model is not None:
        find_model(tuning.model)
