"""A model whose blocks are not in memory has the perplexity of the whole one, to the last bit."""

import dataclasses
from pathlib import Path

import pytest
import torch
from tiny_models import TINY_MODELS
from transformers import PreTrainedTokenizerFast

from pared.calibration.spool import ActivationMemory
from pared.checkpoint.open_streamed import open_streamed
from pared.data.texts import find_text
from pared.data.windows import Windows, cut
from pared.errors import ParedError
from pared.evaluation.perplexity import perplexity
from pared.models.source import find_model


@pytest.fixture
def windows(tokenizer: PreTrainedTokenizerFast, text_file: Path) -> Windows:
    return cut(find_text(f"file:{text_file}"), tokenizer, 12, 4)


@pytest.mark.parametrize("limit", [None, 0])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3", "qwen2_moe"])
def test_it_is_that_of_the_whole_model(
    family: str, limit: int | None, windows: Windows, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    TINY_MODELS[family]().save_pretrained(tmp_path / "model")
    source = find_model(str(tmp_path / "model"))
    store = open_streamed(source)
    told: list[int] = []
    with ActivationMemory(limit, tmp_path / "out") as memory:
        found = perplexity(
            store.model, tokenizer, windows, store=store, memory=memory, on_window=lambda: told.append(1)
        )
    assert found == perplexity(source.load(), tokenizer, windows)
    assert len(told) == 4


def test_a_loss_that_is_no_number_names_the_window_and_the_module(
    windows: Windows, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    model = TINY_MODELS["llama"]()
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.fill_(
            3e38
        )  # finite: a weight that is not is refused when it is read
    model.save_pretrained(tmp_path)
    store = open_streamed(find_model(str(tmp_path)))
    with pytest.raises(ParedError, match=r"window 0 of .*; model.layers.1.mlp.down_proj is the first to output NaN"):
        perplexity(store.model, tokenizer, windows, store=store)


def test_windows_of_several_lengths_are_measured_too(
    windows: Windows, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    mask = torch.ones_like(windows.tokens)
    mask[1, 7:] = 0
    short = dataclasses.replace(windows, mask=mask)
    TINY_MODELS["llama"]().save_pretrained(tmp_path)
    source = find_model(str(tmp_path))
    store = open_streamed(source)
    assert perplexity(store.model, tokenizer, short, store=store) == perplexity(source.load(), tokenizer, short)
