"""How fast models are, and what memory they take: one against another, in turns."""

from typing import TYPE_CHECKING

from pared.lazy import lazy_package

if TYPE_CHECKING:
    from pared.evaluation.speed.bench import Bench, Timed, bench
    from pared.evaluation.speed.drafted import Drafted, DraftRun, drafted
    from pared.evaluation.speed.settings import PRESETS, Case, Settings, parse_case, preset

__all__ = [
    "PRESETS",
    "Bench",
    "Case",
    "DraftRun",
    "Drafted",
    "Settings",
    "Timed",
    "bench",
    "drafted",
    "parse_case",
    "preset",
]

lazy_package(
    __name__,
    {
        "pared.evaluation.speed.bench": ["Bench", "Timed", "bench"],
        "pared.evaluation.speed.drafted": ["DraftRun", "Drafted", "drafted"],
        "pared.evaluation.speed.settings": ["PRESETS", "Case", "Settings", "parse_case", "preset"],
    },
)
