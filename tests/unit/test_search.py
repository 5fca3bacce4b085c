"""A whole search on a tiny model: truly measured, put back, resumed, refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import TINY_MODELS

from pared import ParedError, Recipe, compress, perplexity
from pared.anatomy import find_anatomy, probe, weight_of
from pared.search.evolution import Rules
from pared.search.run import Look, search
from pared.search.zeros import Ordered, ZerosTrial
from pared.sparsity import METHODS, Unstructured

RULES = Rules(iterations=8, population=4, top=2)
LOOK = Look(windows=3, length=16)


@pytest.fixture
def recipe(text_file: Path) -> Any:
    def of(method: str = "wanda", **fields: Any) -> Recipe:
        calibration = {"text": f"file:{text_file}", "samples": 5, "length": 16, "batch": 2, "dtype": "float32"}
        budget = {} if "keep" in fields else {"sparsity": 0.6}
        return Recipe.of({"method": method, "calibration": calibration, **budget, **fields})

    return of


def test_x(recipe, tokenizer, tmp_path) -> None:
    model = TINY_MODELS["llama"]()
    found = search(model, tokenizer, recipe(), RULES, LOOK, tmp_path / "a")
    print(json.dumps(found.told, indent=1))
    print((tmp_path / "a" / "journal.jsonl").read_text())
    assert 0
