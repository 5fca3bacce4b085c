"""DSA programs: from the scores of a block's weights to one number, and from those of all blocks to sparsities."""

from typing import TYPE_CHECKING

from pared.lazy import lazy_package

if TYPE_CHECKING:
    from pared.allocation.dsa.evaluate import (
        ProgramResult,
        allocation_key,
        evaluate_program,
        importance,
        sparsities,
        validation_errors,
    )
    from pared.allocation.dsa.grammar import Program, parse
    from pared.allocation.dsa.named import Named, named
    from pared.allocation.dsa.operators import POST, PRE, REDUCE
    from pared.allocation.dsa.presets import (
        DEFAULT_OF_RANKS,
        DEFAULT_OF_ZEROS,
        PACKAGED,
        SCORE_TOKENS,
        Packaged,
        packaged_of,
    )
    from pared.allocation.dsa.scores import ScoreHistogram, Scores, as_scores
    from pared.allocation.dsa.variation import EVERYTHING, RELEASED, Space, crossover, mutate, random_program

__all__ = [
    "DEFAULT_OF_RANKS",
    "DEFAULT_OF_ZEROS",
    "EVERYTHING",
    "PACKAGED",
    "POST",
    "PRE",
    "REDUCE",
    "RELEASED",
    "SCORE_TOKENS",
    "Named",
    "Packaged",
    "Program",
    "ProgramResult",
    "ScoreHistogram",
    "Scores",
    "Space",
    "allocation_key",
    "as_scores",
    "crossover",
    "evaluate_program",
    "importance",
    "mutate",
    "named",
    "packaged_of",
    "parse",
    "random_program",
    "sparsities",
    "validation_errors",
]

lazy_package(
    __name__,
    {
        "pared.allocation.dsa.evaluate": [
            "ProgramResult",
            "allocation_key",
            "validation_errors",
            "importance",
            "evaluate_program",
            "sparsities",
        ],
        "pared.allocation.dsa.grammar": ["Program", "parse"],
        "pared.allocation.dsa.named": ["Named", "named"],
        "pared.allocation.dsa.operators": ["POST", "PRE", "REDUCE"],
        "pared.allocation.dsa.presets": [
            "DEFAULT_OF_RANKS",
            "DEFAULT_OF_ZEROS",
            "PACKAGED",
            "SCORE_TOKENS",
            "Packaged",
            "packaged_of",
        ],
        "pared.allocation.dsa.scores": ["ScoreHistogram", "Scores", "as_scores"],
        "pared.allocation.dsa.variation": [
            "EVERYTHING",
            "RELEASED",
            "Space",
            "crossover",
            "mutate",
            "random_program",
        ],
    },
)
