"""Folders of models whose MLPs lost channels, as the tests of tuning, converting and adapting take them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from tiny_models import TINY_MODELS
from transformers import PreTrainedTokenizerFast

import pared

_COMMON = {"structures": "widths", "multiple_of": 4, "statistics": "once"}
# What differs is how the layers are stored: with the loader, plain as the architecture has them, beside ranks.
NARROW: dict[str, dict[str, Any]] = {
    "widths": {**_COMMON, "keep": 0.8},
    "uniform": {**_COMMON, "keep": 0.8, "allocation": "uniform"},
    "mixed": {**_COMMON, "keep": 0.6, "structures": "mixed", "storage": "factors"},
    "mixed pivoted": {**_COMMON, "keep": 0.6, "structures": "mixed", "storage": "pivoted"},
}
Folders = Callable[[str, str], Path]


def narrow_folders(place: Path, tokenizer: PreTrainedTokenizerFast, calibration: pared.Calibration) -> Folders:
    """Return what makes a family's folder of a kind, once; the dense parent lies beside it."""
    made: dict[tuple[str, str], Path] = {}

    def of(kind: str, family: str = "llama") -> Path:
        if (kind, family) not in made:
            dense, out = place / family, place / f"{family}_{kind}".replace(" ", "_")
            if not dense.exists():
                TINY_MODELS[family]().save_pretrained(dense)
                tokenizer.save_pretrained(dense)
            evaluation = {"text": calibration.text, "length": 16, "windows": 4}
            recipe = {"model": str(dense), "out": str(out), "calibration": calibration, "evaluation": evaluation}
            pared.run(pared.Recipe.model_validate({**recipe, **NARROW[kind]}))
            made[kind, family] = out
        return made[kind, family]

    return of
