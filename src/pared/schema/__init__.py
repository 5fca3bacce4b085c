"""Everything a user reads or writes as YAML or JSON: data, which knows no torch."""

from typing import TYPE_CHECKING

from pared.lazy import lazy_package

if TYPE_CHECKING:
    from pared.schema.evaluate import EvaluationConfig
    from pared.schema.manifest import Manifest
    from pared.schema.plan import Plan
    from pared.schema.recipe import Calibration, Evaluation, Recipe
    from pared.schema.search import SearchConfig
    from pared.schema.training import TrainingConfig

__all__ = [
    "Calibration",
    "Evaluation",
    "EvaluationConfig",
    "Manifest",
    "Plan",
    "Recipe",
    "SearchConfig",
    "TrainingConfig",
]

lazy_package(
    __name__,
    {
        "pared.schema.evaluate": ["EvaluationConfig"],
        "pared.schema.manifest": ["Manifest"],
        "pared.schema.plan": ["Plan"],
        "pared.schema.recipe": ["Calibration", "Evaluation", "Recipe"],
        "pared.schema.search": ["SearchConfig"],
        "pared.schema.training": ["TrainingConfig"],
    },
)
