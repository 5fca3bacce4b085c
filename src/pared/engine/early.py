"""What is refused from a recipe, and from what lies on the disk, before anything that takes long is imported or read.

A dry run (`pared plan`), the command line and the Python functions refuse by the same rules.
"""

from pathlib import Path

from pared.allocation import allocator_of
from pared.data.labelled import SETS as LABELLED
from pared.data.texts import require_text
from pared.engine.spec import (
    allocation_of,
    calibrates,
    evaluated_text,
    is_pruning,
    layer_allocation_of,
    method_of,
    options_of,
    pattern_of,
    rank_options_of,
    refit_of,
    tries,
)
from pared.environment import require_device
from pared.errors import ParedError
from pared.io.apart import require_apart
from pared.io.files import path_of
from pared.io.inputs import inputs_of
from pared.io.output_dir import require_free
from pared.models.source import ModelSource, find_model, require_dense, require_one_stack
from pared.schema.presets import require_user_fields
from pared.schema.recipe import Recipe


def require_possible(recipe: Recipe) -> None:
    """Refuse what a recipe alone shows to be impossible, or to be nothing.

    Raises:
        ParedError: unknown method, allocation or option, a value of another type, two budgets, a budget that leaves
            nothing to do, or a field that the method does not read.
    """
    method_of(recipe)
    require_device(recipe.device)
    options_of(recipe)
    if is_pruning(recipe):
        layer_allocation_of(recipe)
        if recipe.pattern is not None:
            pattern_of(recipe.pattern)
        if recipe.sparsity == 0:
            raise ParedError("sparsity 0 makes nothing zero; 0.5 makes half of the weights zero")
    else:
        allocator_of(allocation_of(recipe))
        rank_options_of(recipe)
        if recipe.keep == 1 and recipe.rank_fraction is None:
            raise ParedError("keep 1 keeps everything, and the model as it is; keep 0.8 removes 20%")


def require_model(recipe: Recipe) -> ModelSource:
    """Find the model a recipe names, and refuse what its configuration, where it is at hand, shows to be impossible.

    Raises:
        ParedError: no model is named or found, it is compressed or quantised already, or the method cannot read it.
    """
    if recipe.model is None:
        raise ParedError("no model is named; give embedded:smollm2-135m, a folder, a .gguf file or a Hub id")
    source = find_model(recipe.model)
    require_suited(source.fields(), recipe, recipe.model)
    return source


def require_suited(config: object, recipe: Recipe, name: str) -> None:
    """Refuse a model that a recipe's method cannot be applied to.

    Args:
        config: of the model, or the fields of its ``config.json``.
        recipe: that is to be applied to it.
        name: of the model, for messages.

    Raises:
        ParedError: it is compressed or quantised already, or an encoder-decoder that was to be calibrated.
    """
    require_dense(config, name)
    if calibrates(recipe) or tries(recipe):
        require_one_stack(config, name, _what_calibrates(recipe))


def _what_calibrates(recipe: Recipe) -> str:
    if method_of(recipe).calibrated:
        return f"method {recipe.method}"
    refits = not is_pruning(recipe) and refit_of(recipe) != "off"
    return f"refit {refit_of(recipe)}" if refits else f"allocation {allocation_of(recipe)}"


def require_texts(recipe: Recipe) -> None:
    """Refuse a recipe whose texts are not there, or that leaves open what its preset leaves to the user.

    Raises:
        ParedError: names the text, or the field.
    """
    require_user_fields(recipe)
    for name in {recipe.calibration.text, evaluated_text(recipe)} - {None}:
        if not str(name).startswith(LABELLED):
            require_text(str(name))


def require_job(recipe: Recipe, overwrite: bool) -> tuple[ModelSource, Path]:
    """Refuse what can be refused without torch: all of the above, and an output that is there.

    Args:
        recipe: with ``model`` and ``out``.
        overwrite: whether an output folder that is there may be replaced.

    Returns:
        The model and the output folder.

    Raises:
        ParedError: anything that is wrong so far.
    """
    require_possible(recipe)
    require_texts(recipe)
    if recipe.model is None:
        require_model(recipe)
    if recipe.out is None:
        raise ParedError("no output folder is named; give --out DIR, or 'out' in the recipe")
    out = path_of(recipe.out)
    require_free(out, overwrite, inputs_of(recipe.model_dump()))
    source = require_model(recipe)
    require_apart(out, [Path(source.place)])
    return source, out
