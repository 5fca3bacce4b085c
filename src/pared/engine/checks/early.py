"""What is refused from a recipe, and from what lies on the disk, before anything that takes long is imported or read.

A dry run (`pared plan`), the command line and the Python functions refuse by the same rules.
"""

from pathlib import Path

from pared.data.labelled import SETS as LABELLED
from pared.data.texts import require_text
from pared.engine.spec import CompressionSpec, ExpertSpec, LowRankSpec, SparseSpec, method_of, resolve
from pared.engine.windows import evaluated_text
from pared.environment import require_device
from pared.errors import ParedError
from pared.io.apart import require_apart
from pared.io.files import path_of
from pared.io.inputs import inputs_of
from pared.io.output_dir import require_free
from pared.io.record import MANIFEST
from pared.io.run_dir import COMPRESSION, run_folder
from pared.models.source import ModelSource, find_model, require_dense, require_one_stack
from pared.names import called
from pared.schema.presets import require_user_fields
from pared.schema.recipe import Recipe


def require_possible(recipe: Recipe) -> CompressionSpec:
    """Resolve a recipe, and refuse what it alone shows to be impossible, or to be nothing.

    Raises:
        ParedError: unknown method, allocation or option, a value of another type, two budgets, a budget that leaves
            nothing to do, or a field that the method does not read.
    """
    method_of(recipe)
    require_device(recipe.device)
    spec = resolve(recipe)
    if isinstance(spec, SparseSpec) and recipe.sparsity == 0:
        raise ParedError("sparsity 0 makes nothing zero; 0.5 makes half of the weights zero")
    whole = recipe.keep == 1 and recipe.rank_fraction is None and not spec.quantized
    if isinstance(spec, (LowRankSpec, ExpertSpec)) and whole:
        raise ParedError("keep 1 keeps everything, and the model as it is; keep 0.8 removes 20%")
    return spec


def require_model(spec: CompressionSpec) -> ModelSource:
    """Find the model a spec names, and refuse what its configuration, where it is available, shows to be impossible.

    Raises:
        ParedError: no model is named or found, it is compressed or quantised already, or the method cannot read it.
    """
    name = spec.recipe.model
    if name is None:
        raise ParedError("no model is named; give embedded:smollm2-135m, a folder, a .gguf file or a Hub id")
    source = find_model(name, spec.recipe.dtype)
    require_suited(source.fields(), spec, name)
    return source


def require_suited(config: object, spec: CompressionSpec, name: str) -> None:
    """Refuse a model that a spec's method cannot be applied to.

    Args:
        config: of the model, or the fields of its ``config.json``.
        spec: that is to be applied to it.
        name: of the model, for messages.

    Raises:
        ParedError: it is compressed or quantised already, or an encoder-decoder that was to be calibrated.
    """
    require_dense(config, name)
    if spec.calibrated or spec.tries:
        require_one_stack(config, name, _what_calibrates(spec))


def _what_calibrates(spec: CompressionSpec) -> str:
    if spec.method_calibrated:
        return f"method {spec.method.name}"
    if spec.refine is not None:
        return "refine"
    if spec.rounds_by_inputs:
        return f"quantize {spec.recipe.quantize}" if spec.recipe.quantize else spec.recipe.budget
    refits = isinstance(spec, LowRankSpec) and spec.refit != "off"
    return f"refit {spec.refit}" if refits else f"allocation {spec.allocator.name}"  # type: ignore[union-attr]


def require_texts(recipe: Recipe) -> None:
    """Refuse a recipe whose texts are not there, or that leaves open what its preset leaves to the user.

    Raises:
        ParedError: names the text, or the field.
    """
    require_user_fields(recipe)
    for name, measured in ((recipe.calibration.text, False), (evaluated_text(recipe), True)):
        if name is not None and not name.startswith(LABELLED):
            require_text(name, evaluation=measured)


def require_job(recipe: Recipe, overwrite: bool, resume: bool = False) -> tuple[CompressionSpec, ModelSource, Path]:
    """Refuse what can be refused without torch: all of the above, and an output that is there.

    Args:
        recipe: with ``model`` and ``out``.
        overwrite: whether an output folder that is there may be replaced.
        resume: whether a killed run is resumed, which only changes what is said of a folder that is there.

    Returns:
        The resolved recipe, the model and the output folder.

    Raises:
        ParedError: anything that is wrong so far.
    """
    spec = require_possible(recipe)
    recipe = spec.recipe
    require_texts(recipe)
    if recipe.model is None:
        require_model(spec)
    if recipe.out is None:
        raise ParedError(f"no output folder is named; give {called('out', 'DIR')}, or 'out' in the recipe")
    out = path_of(recipe.out)
    left = run_folder(out, COMPRESSION).is_dir()
    if resume and not overwrite and not left and (out / MANIFEST).is_file():
        raise ParedError(f"output folder {out} is finished, by another recipe, of other files or versions, and there "
                         f"is nothing to resume; name another or pass {called('overwrite', 'True')}")  # fmt: skip
    require_free(out, overwrite, inputs_of(recipe.model_dump()))
    source = require_model(spec)
    require_apart(out, [Path(source.place)])
    return spec, source, out
