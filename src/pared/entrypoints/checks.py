"""What is refused before torch is imported, and what can be said without it; every command asks here first.

A command imports this page, which imports nothing, then what it needs of it, and the work only if nothing is wrong.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

from pared.names import require_known

if TYPE_CHECKING:
    from pathlib import Path

    from pared.schema.evaluate import EvaluationConfig
    from pared.schema.explore import ExploreConfig
    from pared.schema.recipe import Recipe
    from pared.schema.training import TrainingConfig

FORMS = ("dense", "gguf", "onnx")  # that models are exported in


def task_names() -> list[str]:
    """Return the names of all tasks: first those in which a model chooses, then those in which it writes."""
    from pared.evaluation import TASKS
    from pared.evaluation.multiple_choice import CHOICES

    return [*CHOICES, *TASKS]


def require_evaluable(model: str | None, config: "EvaluationConfig") -> None:
    """Refuse what cannot be measured.

    Args:
        model: by name; none for one that is loaded.
        config: what is to be measured of it.

    Raises:
        ParedError: an unknown device, dtype, protocol, text, task or set of examples, a file that is not there, or no
            model of that name or of that to compare with.
    """
    from pared.data.labelled import parts_of_task, require_examples
    from pared.data.texts import require_text
    from pared.entrypoints.evaluation.kept_results import is_results
    from pared.environment import require_device, require_dtype
    from pared.evaluation.protocols import protocol_of
    from pared.evaluation.vision_sets import require_questions
    from pared.models.source import find_model

    require_device(config.device)
    require_dtype(config.dtype)
    if config.protocol is not None:
        protocol_of(config.protocol)
    checks: dict[str, Callable[[str], object]] = {
        "perplexity": lambda name: require_text(name, evaluation=True),
        "examples": require_examples,
        "tasks": lambda name: require_known("task", name, task_names()),
        "vqa": require_questions,
        "fine_tune": parts_of_task,
    }
    for measure in config.measures:
        named = getattr(config, measure)
        for name in [named] if isinstance(named, str) else named:
            checks[measure](name)
    if model is not None:
        find_model(model)
    if config.against is not None and not is_results(config.against):
        find_model(config.against)


def require_compression(recipe: "Recipe", overwrite: bool, resume: bool | None = None) -> None:
    """Refuse a compression that cannot be, from the recipe and the disk.

    Args:
        recipe: with ``model`` and ``out``.
        overwrite: whether an output folder that is there may be replaced.
        resume: whether a killed run is resumed or removed; an output that is there may be that of a run which has
            ended, or was killed behind its end, which the run itself looks at.

    Raises:
        ParedError: says what is wrong.
    """
    from pared.engine.checks.early import require_job
    from pared.io.files import path_of
    from pared.io.run_dir import COMPRESSION, run_folder

    out = None if recipe.out is None else path_of(recipe.out)
    ended = resume is not False and out is not None and (bool(resume) or run_folder(out, COMPRESSION).is_dir())
    require_job(recipe, overwrite or ended, bool(resume))


def require_plan(recipe: "Recipe") -> None:
    """Refuse a recipe, and a model that it names, of which no plan can be made.

    Raises:
        ParedError: says what is wrong.
    """
    from pared.engine.checks.early import require_model, require_possible, require_suited

    spec = require_possible(recipe)
    source = require_model(spec)
    require_suited(source.config(), spec, source.name)


def require_rank_groups(recipe: "Recipe") -> None:
    """Refuse a recipe whose method has no directions, and all that a plan refuses.

    Raises:
        ParedError: says what is wrong.
    """
    from pared.engine.spec import resolve_low_rank

    resolve_low_rank(recipe).method.require_solve()
    require_plan(recipe)


def require_exploration(recipe: "Recipe", config: "ExploreConfig") -> None:
    """Refuse a recipe that cannot be explored, and a model that it names.

    Raises:
        ParedError: says what is wrong.
    """
    from pared.engine.checks.early import require_model
    from pared.engine.checks.explorable import require_explorable

    for spec in require_explorable(recipe, config.structures, config.pruner).values():
        require_model(spec)


def require_search(recipe: "Recipe") -> None:
    """Refuse a recipe, and a model that it names, that nothing can be searched for.

    Raises:
        ParedError: says what is wrong.
    """
    from pared.engine.checks.early import require_model, require_possible

    require_model(require_possible(recipe))


def require_training(config: "TrainingConfig", overwrite: bool) -> None:
    """Refuse a training that cannot be, from what is asked for and the disk.

    Args:
        config: with ``model`` and ``out``.
        overwrite: whether an output folder that is there may be replaced.

    Raises:
        ParedError: says what is wrong.
    """
    from pared.training.early import require_possible

    require_possible(config, overwrite)


def require_export(model: str, out: "Path", form: str, dtype: str = "auto", quantize: str = "auto") -> None:
    """Refuse a form that no model is exported in, and a model that is not there.

    Args:
        model: by name.
        out: the folder or file to make.
        form: one of :data:`FORMS`.
        dtype: of a dense folder.
        quantize: of a GGUF file.

    Raises:
        ParedError: offers the nearest name, or says what to run instead.
    """
    from pared.errors import ParedError
    from pared.models.source import find_model
    from pared.names import called

    require_known("form", form, FORMS)
    if form != "dense" and dtype != "auto":
        stored = called("quantize") if form == "gguf" else "float32 always"
        raise ParedError(f"{called('dtype')} says what a dense folder stores; for {called('to', form)}: {stored}")
    if form == "gguf":
        _require_gguf(out, quantize)
    elif quantize != "auto":
        raise ParedError(f"{called('quantize')} says what a .gguf file stores; expected {called('to', 'gguf')} with it")
    find_model(model)


def _require_gguf(out: "Path", quantize: str) -> None:
    """Refuse a type that no GGUF file is written in, and a file of another name.

    Raises:
        ParedError: says which types there are, or what makes the type that was asked for.
    """
    import importlib.util

    from pared.errors import ParedError
    from pared.names import called
    from pared.serving.gguf.types import TYPES

    if quantize.lower().startswith(("q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "iq")):
        raise ParedError(
            f"{called('quantize', quantize)}: the gguf package makes no {quantize}; write {called('quantize', 'f16')} "
            f"and run llama.cpp's own: llama-quantize {out} SMALLER.gguf {quantize.upper()}"
        )
    require_known("type of a .gguf file", quantize, ["auto", *TYPES])
    if out.suffix != ".gguf":
        raise ParedError(f"output {out}: expected the name of a file that ends with .gguf")
    if importlib.util.find_spec("gguf") is None:
        raise ParedError("writing a .gguf file needs the package gguf; install it with: pip install gguf")


def trusting_everywhere() -> AbstractContextManager[None]:
    """Let code that lies in the folders of models run, in this process and in those it starts."""
    from pared.models.trust import trusting_everywhere as trusting

    return trusting()
