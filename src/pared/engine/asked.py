"""What a recipe asks for, looked up and checked: method, budget, allocator, text and, from shapes, the plan."""

import logging
from dataclasses import replace
from typing import cast

from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from pared.allocation import Budget, allocator_of, make_plan
from pared.anatomy import find_anatomy
from pared.engine.groups import candidate_units
from pared.errors import ParedError
from pared.lowrank import METHODS, LowRankMethod
from pared.names import did_you_mean
from pared.plan import Plan
from pared.recipe import Recipe
from pared.sources.labelled import find_windows
from pared.sources.texts import find_text
from pared.sources.windows import Windows, cut, digest_of

log = logging.getLogger(__name__)

TRIAL_WINDOWS = 8  # windows kept apart for allocators that try what they propose


def method_of(recipe: Recipe) -> LowRankMethod:
    """Return the method a recipe names.

    Raises:
        ParedError: there is none of that name.
    """
    if recipe.method not in METHODS:
        raise ParedError(f"unknown method {recipe.method!r}; {did_you_mean(recipe.method, METHODS)}")
    return METHODS[recipe.method]


def options_of(recipe: Recipe) -> dict[str, object]:
    """Return the method's options, those of the recipe over the defaults.

    Raises:
        ParedError: an option the method does not have, or a value of another type.
    """
    method = method_of(recipe)
    for name, value in recipe.options.items():
        if name not in method.options:
            valid = did_you_mean(name, method.options) if method.options else "it has none"
            raise ParedError(f"method {method.name} has no option {name!r}; {valid}")
        default = method.options[name]
        if type(value) is not type(default) and not (isinstance(default, float) and type(value) is int):
            raise ParedError(
                f"option {name} of method {method.name}: expected a {type(default).__name__}, found {value!r}"
            )
    options: dict[str, object] = {**method.options, **recipe.options}
    try:
        method.check(options)
    except ValueError as error:
        raise ParedError(f"method {method.name}: {error}") from None
    return options


def allocation_of(recipe: Recipe) -> str:
    """Return the name of the allocator a recipe asks for, the method's own if it says ``auto``."""
    if recipe.rank_fraction is not None:
        return "rank-fraction"
    return method_of(recipe).allocation if recipe.allocation == "auto" else recipe.allocation


def budget_of(recipe: Recipe) -> Budget:
    """Return how much of the covered parameters may stay, and what a rank costs in the storage asked for."""
    pivoted = method_of(recipe).pivoted if recipe.storage == "auto" else recipe.storage == "pivoted"
    return Budget(recipe.keep, pivoted, recipe.rank_fraction)


def refit_of(recipe: Recipe) -> str:
    """Return the refit stage a recipe asks for, the method's own if it says ``auto``."""
    return method_of(recipe).refit(recipe.keep) if recipe.refit == "auto" else recipe.refit


def statistics_of(recipe: Recipe) -> str:
    """Return when a recipe's statistics are collected, as the method says if it says ``auto``."""
    return method_of(recipe).statistics(recipe.keep) if recipe.statistics == "auto" else recipe.statistics


def dense_path_of(recipe: Recipe) -> float:
    """Return the share of the dense model's outputs in targets, the method's own if a recipe says ``auto``."""
    return method_of(recipe).dense_path if recipe.dense_path == "auto" else recipe.dense_path


def plan_of(model: PreTrainedModel, recipe: Recipe, bytes_per_parameter: int | None = None) -> Plan:
    """Decide every site from shapes alone; the model may be on the meta device.

    Where the ranks depend on the data, those of uniform allocation stand in: the sizes are right to a rank.

    Raises:
        ParedError: unknown method or allocation, nothing to compress, or a budget too small.
    """
    options = options_of(recipe)
    allocation = allocation_of(recipe)
    by_shape = "uniform" if allocator_of(allocation).needs else allocation
    anatomy = find_anatomy(model).without(recipe.skip)
    units = None
    if options.get("sharing") in ("paper", "all"):  # what is measured is not known from shapes: each weight alone
        units = candidate_units(anatomy, cast("int", options["group_size"]), str(options["sharing"]))
    return make_plan(anatomy, by_shape, budget_of(recipe), bytes_per_parameter or model.dtype.itemsize, units)


def calibration_windows(
    recipe: Recipe, tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig, causal: bool
) -> Windows:
    """Cut a recipe's calibration text, or its labelled examples.

    Args:
        recipe: whose calibration is read.
        tokenizer: of the model.
        config: of the model; knows its classes.
        causal: whether it is a causal language model, which reads texts only.

    Raises:
        ParedError: the text is unknown, or shorter than one window.
    """
    asked = recipe.calibration
    return find_windows(asked.text, tokenizer, config, causal, asked.length, asked.samples, asked.sampling, asked.seed)


def trial_windows(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> Windows:
    """Cut the windows that follow those a recipe calibrates on, for allocators that try what they propose.

    A text that has no more of them gives the last that are calibrated on, and says so in the log.

    Raises:
        ParedError: the text is unknown, or shorter than one window.
    """
    asked = recipe.calibration
    text = find_text(asked.text)
    if asked.sampling == "random-offset":
        return cut(text, tokenizer, asked.length, TRIAL_WINDOWS, asked.sampling, asked.seed + 1)
    windows = cut(text, tokenizer, asked.length, asked.samples + TRIAL_WINDOWS)
    apart = len(windows.tokens) - asked.samples
    if apart < 1:
        log.warning("text %r has no windows beside the calibration windows: trials use the last of those", text.name)
    tokens = windows.tokens[-(apart if apart > 0 else TRIAL_WINDOWS) :]
    return replace(windows, tokens=tokens, digest=digest_of(tokens))
