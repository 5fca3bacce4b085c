"""Folders of models that a test changed in memory, each saved once."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

Saved = Callable[[str], tuple[Path, torch.Tensor]]


def saved_once(
    make: Callable[[str], PreTrainedModel],
    answer: Callable[[PreTrainedModel], torch.Tensor],
    places: pytest.TempPathFactory,
    tokenizer: PreTrainedTokenizerFast,
) -> Saved:
    """Return what gives a family's folder, and what the model in memory answered.

    Args:
        make: a family's model.
        answer: of a model.
        places: for the folders.
        tokenizer: that is saved beside each.
    """
    made: dict[str, tuple[Path, torch.Tensor]] = {}

    def folder_of(family: str) -> tuple[Path, torch.Tensor]:
        if family not in made:
            model, folder = make(family), places.mktemp(family)
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            made[family] = folder, answer(model)
        return made[family]

    return folder_of
