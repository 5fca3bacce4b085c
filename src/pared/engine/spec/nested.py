"""What a folder of every size can be made by: what a smaller size is made of must be a part of a larger one."""

from pared.engine.spec.specs import LowRankSpec
from pared.errors import ParedError
from pared.names import called
from pared.schema.recipe import Recipe

NESTED = {"storage": "factors", "statistics": "once", "refit": "off"}  # what ``auto`` stands for
KNOWN = frozenset({"cost"})  # the evidence of an allocation that is stored with the factors


def nested(recipe: Recipe) -> Recipe:
    """Return a recipe that leaves nothing open which decides whether sizes lie in one another."""
    return recipe.model_copy(update={name: own for name, own in NESTED.items() if getattr(recipe, name) == "auto"})


def require_nested(spec: LowRankSpec) -> None:
    """Refuse what no smaller size can be cut out of.

    Raises:
        ParedError: names what was asked for, why its sizes do not lie in one another, and what to take instead.
    """
    recipe = spec.recipe
    left = sorted(spec.allocator.requires - KNOWN)
    reasons = {
        f"structures {spec.structures}": (
            spec.structures != "ranks",
            f"what stays of a narrower layer makes up for what goes; take {called('structures', 'ranks')}",
        ),
        "storage pivoted": (
            spec.budget.pivoted,
            f"every rank has pivots of its own; take {called('storage', 'factors')}, and convert a slice to pivots",
        ),
        "statistics sequential": (
            spec.statistics == "sequential",
            f"they are of one size; take {called('statistics', 'once')}",
        ),
        f"refit {spec.refit}": (spec.refit != "off", f"it is of one size; take {called('refit', 'off')}"),
        "refine": (spec.refine is not None, "it is of one size; leave it out"),
        recipe.budget: (
            recipe.rank_fraction is not None or recipe.of_bytes,
            f"sizes are fractions of the target parameters; give {called('keep', '0.9')}",
        ),
        f"quantize {recipe.quantize}": (
            recipe.quantize is not None,
            "rounding is of one size; leave it out, and convert a slice to few bits",
        ),
        f"allocation {spec.allocator.name}": (
            bool(left),
            f"it needs {' and '.join(left)}, which the folder does not hold; take {called('allocation', 'loss')}",
        ),
    }
    for what, (found, why) in reasons.items():
        if found:
            raise ParedError(f"elastic writes sizes that lie in one another, got {what}: {why}")
