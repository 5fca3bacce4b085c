"""How fast models are, and what memory they take: one against another, in turns."""

from pared.evaluation.speed.bench import Bench, Timed, bench
from pared.evaluation.speed.settings import PRESETS, Case, Settings, parse_case, preset

__all__ = ["PRESETS", "Bench", "Case", "Settings", "Timed", "bench", "parse_case", "preset"]
