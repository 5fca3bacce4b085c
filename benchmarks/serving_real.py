"""Folders of the embedded SmolLM2, stored in every way, for `benchmarks/serving.py`."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

import pared
from pared.checkpoint import mark
from serving_folders import STORAGES, at_keep

MODEL = "embedded:smollm2-135m"
CALIBRATION = pared.Calibration(text="embedded", samples=8, length=256, batch=2)
# What an engine reads is tested, not what the methods are worth: little calibration is enough.
RECIPES: Mapping[str, Mapping[str, Any]] = {
    "factors": {"method": "svd-llm", "keep": 0.8, "storage": "factors"},
    "sparse": {"method": "wanda", "sparsity": 0.5},
}
# Speed depends on ranks, not on what is in the factors.
SPEED = {f"{kind} {keep}": partial(at_keep, keep=keep, pivoted=kind == "pivoted")
         for kind in ("factors", "pivoted") for keep in (0.8, 0.5)}  # fmt: skip
BY_HAND = {**{name: STORAGES[name] for name in ("2:4", "shared", "widths", "heads", "every kind")}, **SPEED}
REAL = [
    "factors",
    "every kind",
    "dense",
    "pivoted",
    "sparse",
    *(name for name in BY_HAND if name not in (*SPEED, "every kind")),
]


def make_real(storage: str, folder: Path) -> Path:
    """Write the folder, unless it is there; the dense one has plain weights."""
    if (folder / "config.json").exists():
        return folder
    if storage in RECIPES:
        recipe = {"model": MODEL, "out": str(folder), "calibration": CALIBRATION, "evaluation": None}
        pared.run(pared.Recipe.model_validate({**recipe, **RECIPES[storage]}))
        return folder
    if storage == "pivoted":
        factors = make_real("factors", folder.with_name(folder.name.replace(storage, "factors")))
        pared.convert(factors, folder, pivoted=True)
        return folder
    model, tokenizer = pared.load(MODEL), pared.load_tokenizer(MODEL)
    torch.manual_seed(0)
    if storage != "dense":
        BY_HAND[storage](model)
        mark(model)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
