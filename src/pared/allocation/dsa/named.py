"""Programs as a recipe names them: by a packaged name, their text, or the ``FOUND.json`` of a search."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from pared.allocation.dsa.grammar import Program, parse
from pared.allocation.dsa.presets import SCORE_TOKENS, packaged_of
from pared.errors import ParedError
from pared.io.files import path_of
from pared.io.guarded import read_json

# Methods whose spectra were sums over the calibration tokens when a search did not yet write `score_tokens`.
SUMMED_ONCE = ("svd-llm", "svd-llm-v2", "swift-svd", "basis-sharing", "fwsvd")


class Named(NamedTuple):
    """A program, and over how many tokens the numbers it reads are summed.

    Attributes:
        program: what is evaluated.
        tokens: numbers are those of so many tokens, whatever was calibrated on: means over tokens times the root.
    """

    program: Program
    tokens: int


def named(text: str, tokens: int = SCORE_TOKENS) -> Named:
    """Return a program by its packaged name, its text, or the path of a ``FOUND.json``.

    Args:
        text: one of them.
        tokens: what a bare text reads; packaged programs and those of a search bring their own.

    Raises:
        ParedError: it is none of them.
    """
    if text.endswith(".json"):
        return _found(Path(text), tokens)
    if ":" in text:
        return Named(parse(text), tokens)
    packaged = packaged_of(text)
    return Named(packaged.program, packaged.tokens)


def _found(path: Path, tokens: int) -> Named:
    """Return the program that a search wrote."""
    found = read_json(path_of(path), "program")
    if not isinstance(found, dict) or not isinstance(found.get("program"), str):
        raise ParedError(f"program {path}: expected an object with a 'program', as `pared search` writes FOUND.json")
    read = found.get("score_tokens", _before_score_tokens(found, tokens))
    if not isinstance(read, int) or isinstance(read, bool) or read < 1:
        raise ParedError(f"program {path}: expected score_tokens, a whole number from 1 on; got {read!r}")
    return Named(parse(found["program"]), read)


def _before_score_tokens(found: Mapping[str, Any], tokens: int) -> object:
    """Return what a search read that summed over its own calibration text, as all did before they said so."""
    settings = found.get("settings")
    if not isinstance(settings, Mapping):
        return tokens
    if "sparsity" not in found and found.get("method") not in SUMMED_ONCE:
        return 1
    samples, length = settings.get("calibration samples"), settings.get("calibration length")
    return samples * length if isinstance(samples, int) and isinstance(length, int) else tokens
