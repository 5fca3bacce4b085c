"""DSA programs: from the scores of a block's weights to one number, and from those of all blocks to sparsities."""

from typing import TYPE_CHECKING

from pared.lazy import lazy_package

if TYPE_CHECKING:
    from pared.allocation.program.evaluate import Verdict, allocation_key, faults, importance, judge, sparsities
    from pared.allocation.program.grammar import Program, parse
    from pared.allocation.program.named import Named, named
    from pared.allocation.program.operators import POST, PRE, REDUCE
    from pared.allocation.program.packaged import (
        DEFAULT_OF_RANKS,
        DEFAULT_OF_ZEROS,
        PACKAGED,
        SCORE_TOKENS,
        Packaged,
        packaged_of,
    )
    from pared.allocation.program.scores import ScoreHistogram, Scores, as_scores
    from pared.allocation.program.variation import EVERYTHING, RELEASED, Space, crossover, mutate, random_program

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
    "ScoreHistogram",
    "Scores",
    "Space",
    "Verdict",
    "allocation_key",
    "as_scores",
    "crossover",
    "faults",
    "importance",
    "judge",
    "mutate",
    "named",
    "packaged_of",
    "parse",
    "random_program",
    "sparsities",
]

lazy_package(
    __name__,
    {
        "pared.allocation.program.evaluate": [
            "Verdict",
            "allocation_key",
            "faults",
            "importance",
            "judge",
            "sparsities",
        ],
        "pared.allocation.program.grammar": ["Program", "parse"],
        "pared.allocation.program.named": ["Named", "named"],
        "pared.allocation.program.operators": ["POST", "PRE", "REDUCE"],
        "pared.allocation.program.packaged": [
            "DEFAULT_OF_RANKS",
            "DEFAULT_OF_ZEROS",
            "PACKAGED",
            "SCORE_TOKENS",
            "Packaged",
            "packaged_of",
        ],
        "pared.allocation.program.scores": ["ScoreHistogram", "Scores", "as_scores"],
        "pared.allocation.program.variation": [
            "EVERYTHING",
            "RELEASED",
            "Space",
            "crossover",
            "mutate",
            "random_program",
        ],
    },
)
