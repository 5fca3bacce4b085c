"""What a recipe asks for, looked up and checked: method, budget, allocator and text."""

from typing import TYPE_CHECKING

from pared.allocation import Budget, allocator_of
from pared.allocation.dsa.presets import SCORE_TOKENS
from pared.allocation.registry import GRANULARITIES, LayerAllocator, layer_allocator_of
from pared.data.texts import held_out
from pared.errors import ParedError
from pared.lowrank import METHODS, LowRankMethod
from pared.names import require_known
from pared.schema.options import checked_options
from pared.schema.recipe import Recipe
from pared.sparsity import METHODS as PRUNING_METHODS
from pared.sparsity import NM, PruningMethod, parse

if TYPE_CHECKING:  # what a recipe asks for is looked up and refused without torch
    from transformers import PreTrainedModel

    from pared.structure import Anatomy


Method = LowRankMethod | PruningMethod
EVERY_METHOD: dict[str, Method] = {**METHODS, **PRUNING_METHODS}

# Fields of a recipe that only one family of methods reads.
ZEROS_ONLY = ("sparsity", "pattern")
LOW_RANK_ONLY = ("keep", "rank_fraction", "storage", "statistics", "refit", "dense_path")


def method_of(recipe: Recipe) -> Method:
    """Return the method a recipe names.

    Raises:
        ParedError: there is none of that name.
    """
    require_known("method", recipe.method, EVERY_METHOD)
    return EVERY_METHOD[recipe.method]


def anatomy_of(model: "PreTrainedModel", recipe: Recipe) -> "Anatomy":
    """Return the sites a recipe covers, from shapes alone.

    Raises:
        ParedError: no such blocks, no linear layer in them, or nothing is left of them.
    """
    from pared.structure import find_anatomy

    return find_anatomy(model, recipe.blocks).without(recipe.skip)


def is_pruning(recipe: Recipe) -> bool:
    """Whether a recipe's method makes weights zero, rather than ranks low."""
    return isinstance(method_of(recipe), PruningMethod)


def low_rank_of(recipe: Recipe) -> LowRankMethod:
    """Return the low-rank method a recipe names.

    Raises:
        ParedError: there is none of that name, or it is of another family.
    """
    method = method_of(recipe)
    if not isinstance(method, LowRankMethod):
        raise ParedError(f"method {method.name} prunes; here one of low rank is needed: {', '.join(METHODS)}")
    return method


def pruner_of(recipe: Recipe) -> PruningMethod:
    """Return the pruning method a recipe names.

    Raises:
        ParedError: there is none of that name, or it is of another family.
    """
    method = method_of(recipe)
    if not isinstance(method, PruningMethod):
        raise ParedError(f"method {method.name} does not prune; here one of {', '.join(PRUNING_METHODS)} is needed")
    return method


def _require_own_fields(recipe: Recipe) -> None:
    """Refuse what a recipe sets and its method does not read."""
    pruning = is_pruning(recipe)
    for name in LOW_RANK_ONLY if pruning else ZEROS_ONLY:
        if (value := getattr(recipe, name)) != Recipe.model_fields[name].default:
            hint = "its budget is sparsity or pattern" if pruning else "its budget is keep or rank_fraction"
            raise ParedError(f"method {recipe.method} knows no {name} (found {value!r}); {hint}")
    if not pruning and recipe.dense_path not in ("auto", 0) and not has_targets(recipe):
        raise ParedError(
            f"dense_path {recipe.dense_path:g} needs targets: a refit (--refit), or sequential statistics of a method "
            f"that collects any; method {recipe.method} has statistics {statistics_of(recipe)} and refit "
            f"{refit_of(recipe)} here"
        )
    if pruning and recipe.sparsity is None and recipe.pattern is None:
        raise ParedError(
            f"method {recipe.method} prunes: name a sparsity, the fraction of zeros (--sparsity 0.5), or a pattern "
            "(--pattern 2:4)"
        )


def pattern_of(text: str) -> NM:
    """Return an N:M pattern.

    Raises:
        ParedError: there is no such pattern, or it keeps everything.
    """
    kept, _, group = text.partition(":")
    if int(kept) > int(group):
        raise ParedError(f"pattern {text} keeps {kept} of every {group}; did you mean {group}:{kept}?")
    try:
        found = parse(text)
    except ValueError as error:
        raise ParedError(str(error)) from None
    if found.sparsity == 0:
        raise ParedError(f"pattern {text} keeps everything; 2:4 makes half of the weights zero")
    assert isinstance(found, NM)
    return found


def options_of(recipe: Recipe) -> dict[str, object]:
    """Return the method's options, those of the recipe over the defaults.

    Raises:
        ParedError: an option the method does not have, or a value of another type.
    """
    _require_own_fields(recipe)
    method = method_of(recipe)
    options = checked_options(recipe.options, method.options, f"method {method.name}")
    try:
        method.check(options)
    except ValueError as error:
        raise ParedError(f"method {method.name}: {error}") from None
    return options


def layer_allocation_of(recipe: Recipe) -> tuple[LayerAllocator, dict[str, object]]:
    """Return how a pruning recipe spreads its zeros, and the options of that.

    Raises:
        ParedError: there is no such allocation of zeros, or an option of it is unknown or of another type.
    """
    allocator = layer_allocator_of(allocation_of(recipe))
    options = checked_options(recipe.allocation_options, allocator.options, f"allocation {allocator.name}")
    if options["granularity"] not in GRANULARITIES:
        raise ParedError(f"option granularity: expected one of {', '.join(GRANULARITIES)}, found "
                         f"{options['granularity']!r}")  # fmt: skip
    return allocator, _with_program(options, SCORE_TOKENS)


def rank_options_of(recipe: Recipe) -> dict[str, object]:
    """Return the options of the allocation of a low-rank recipe.

    Raises:
        ParedError: there is no such allocation, or an option of it is unknown or of another type.
    """
    allocator = allocator_of(allocation_of(recipe))
    options = checked_options(recipe.allocation_options, allocator.options, f"allocation {allocator.name}")
    return _with_program(options, 1)


def _with_program(options: dict[str, object], tokens: int) -> dict[str, object]:
    """Return the options with the program itself in place of the file that holds it, so that the record is whole."""
    if "program" not in options:
        return options
    from pared.allocation.dsa import named

    asked = int(str(options["score_tokens"]))
    if asked < 0:
        raise ParedError(f"option score_tokens: expected a number of tokens, or 0 for the program's own; got {asked}")
    text = str(options["program"])
    if not text.endswith(".json"):
        named(text)
        return options
    program, tokens = named(text, tokens)
    return {**options, "program": str(program), "score_tokens": asked or tokens}


def allocation_of(recipe: Recipe) -> str:
    """Return the name of the allocator a recipe asks for, the method's own if it says ``auto``."""
    if recipe.rank_fraction is not None:
        return "rank-fraction"
    return method_of(recipe).allocation if recipe.allocation == "auto" else recipe.allocation


def budget_of(recipe: Recipe) -> Budget:
    """Return how much of the covered parameters may stay, and what a rank costs in the storage asked for."""
    pivoted = low_rank_of(recipe).pivoted if recipe.storage == "auto" else recipe.storage == "pivoted"
    return Budget(recipe.keep, pivoted, recipe.rank_fraction)


def refit_of(recipe: Recipe) -> str:
    """Return the refit stage a recipe asks for, the method's own if it says ``auto``."""
    return low_rank_of(recipe).refit(recipe.keep) if recipe.refit == "auto" else recipe.refit


def statistics_of(recipe: Recipe) -> str:
    """Return when a recipe's statistics are collected, as the method says if it says ``auto``."""
    return low_rank_of(recipe).statistics(recipe.keep) if recipe.statistics == "auto" else recipe.statistics


def has_targets(recipe: Recipe) -> bool:
    """Whether a stage follows whose targets may be the dense model's outputs."""
    again = statistics_of(recipe) == "sequential" and low_rank_of(recipe).walked
    return again or refit_of(recipe) != "off"


def calibrates(recipe: Recipe) -> bool:
    """Whether the model is run on a text: for statistics, a refit, or an allocation that looks at what it answers."""
    if is_pruning(recipe):
        return method_of(recipe).calibrated or bool(layer_allocation_of(recipe)[0].needs & {"scores", "losses"})
    influence = "influence" in allocator_of(allocation_of(recipe)).needs
    return method_of(recipe).calibrated or refit_of(recipe) != "off" or influence


def tries(recipe: Recipe) -> bool:
    """Whether the allocation tries what it proposes, on windows that are not calibrated on."""
    return not is_pruning(recipe) and "trial" in allocator_of(allocation_of(recipe)).needs


def settled(recipe: Recipe) -> dict[str, object]:
    """Return what a recipe's ``auto`` stands for, for the record."""
    if is_pruning(recipe):
        return {"allocation": allocation_of(recipe), **layer_allocation_of(recipe)[1]}
    return {
        "allocation": allocation_of(recipe),
        **rank_options_of(recipe),
        "storage": "pivoted" if budget_of(recipe).pivoted else "factors",
        "statistics": statistics_of(recipe),
        "refit": refit_of(recipe),
        **({"dense_path": dense_path_of(recipe)} if has_targets(recipe) else {}),
    }


def dense_path_of(recipe: Recipe) -> float:
    """Return the share of the dense model's outputs in targets, the method's own if a recipe says ``auto``."""
    return low_rank_of(recipe).dense_path if recipe.dense_path == "auto" else recipe.dense_path


def evaluated_text(recipe: Recipe) -> str | None:
    """Return the name of what perplexity is measured on, the held-out part if that is left open; None for nothing."""
    asked = recipe.evaluation
    if asked is None:
        return None
    return held_out(recipe.calibration.text) if asked.text == "auto" else asked.text
