"""Which recipes a model can be explored by: those whose losses add up over a model, and what each structure takes."""

from collections.abc import Mapping, Sequence

from pared.engine.spec import CompressionSpec, LowRankSpec, resolve_low_rank, resolve_sparse
from pared.errors import ParedError
from pared.names import called
from pared.schema.recipe import BUDGETS, Recipe


def recipe_of(recipe: Recipe, structure: str, keep: float, pruner: str) -> Recipe:
    """Return the recipe that compresses to a budget of one structure as it is explored.

    Args:
        recipe: of the exploration; its budget and its structures are not read.
        structure: ``ranks``, ``widths``, ``mixed`` or ``zeros``.
        keep: the fraction of the target parameters that stays.
        pruner: the method of zeros.
    """
    given = {name: getattr(recipe, name) for name in recipe.model_fields_set}
    for name in (*BUDGETS, "structures"):
        given.pop(name, None)
    if structure != "zeros":
        if structure == "ranks":
            given = {name: value for name, value in given.items() if name not in ("multiple_of", "heads")}
        return Recipe.of({**given, "structures": structure, "keep": keep})
    shared = {name: value for name, value in given.items()
              if name in ("model", "skip", "blocks", "calibration", "evaluation", "dtype", "device")}  # fmt: skip
    return Recipe.of({**shared, "method": pruner, "allocation": "loss", "sparsity": 1 - keep})


def require_explorable(recipe: Recipe, structures: Sequence[str], pruner: str) -> Mapping[str, CompressionSpec]:
    """Resolve what each structure of an exploration takes.

    Raises:
        ParedError: a method whose losses cannot be compared over weights, or anything that a compression refuses.
    """
    specs: dict[str, CompressionSpec] = {}
    for structure in structures:
        asked = recipe_of(recipe, structure, 0.8, pruner)
        specs[structure] = spec = resolve_sparse(asked) if structure == "zeros" else resolve_low_rank(asked)
        if spec.allocator.name != "loss":
            raise ParedError(
                f"method {asked.method} has allocation {spec.allocator.name}, and losses that cannot be added up over "
                f"a model; explore with {called('method', 'loss-optimal')}"
            )
        if spec.quantized:
            raise ParedError(f"an exploration prices no rounding, got quantize {asked.quantize}; leave it out")
        if isinstance(spec, LowRankSpec) and spec.refit != "off":
            raise ParedError(f"an exploration solves once, got refit {spec.refit}; leave it out")
    return specs
