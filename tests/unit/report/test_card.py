"""The card that lies in every folder: its code runs as it stands."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import TINY_MODELS
from tiny_tokenizer import tiny_tokenizer
from transformers import PreTrainedModel, PreTrainedTokenizerFast, T5ForConditionalGeneration

import pared
from pared import Recipe
from unit.checkpoint.test_own_code import foreign
from unit.entrypoints.test_encoder_decoder import tiny

PRUNED: dict[str, dict[str, Any]] = {
    "sparse": {"method": "magnitude", "sparsity": 0.5},
    "2:4": {"method": "magnitude", "pattern": "2:4"},
}
HOWS: dict[str, dict[str, Any]] = {"svd": {"method": "svd", "keep": 0.6}, **PRUNED}
TOKENS = torch.arange(1, 9).unsqueeze(0)


def run_card(model: Path, place: Path, how: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Compress a model into ``made`` and run the code of its card beside it, all in one namespace."""
    pared.run(Recipe(model=str(model), out=str(place / "made"), evaluation=None, **how))
    blocks = re.findall(r"```python\n(.*?)```", (place / "made" / "README.md").read_text(), flags=re.DOTALL)
    assert len(blocks) == 3
    monkeypatch.chdir(place)
    names: dict[str, Any] = {}
    loaded: list[PreTrainedModel] = []
    for block in blocks:
        exec(block, names)
        loaded.append(names["model"])
    assert type(loaded[0]).__name__ == type(loaded[1]).__name__
    assert (place / "merged" / "config.json").is_file()
    return names


@pytest.mark.parametrize("how", HOWS.values(), ids=HOWS)
@pytest.mark.parametrize("family", ["llama", "bert", "gpt2", "t5"])
def test_the_code_of_a_card_did_not_run(
    family: str,
    how: dict[str, Any],
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Regression: every card said AutoModelForCausalLM, and merged adapters into zeros, which cannot be saved."""
    dense = tiny("t5") if family == "t5" else TINY_MODELS[family]()
    dense.save_pretrained(tmp_path / "dense")
    (tiny_tokenizer(64) if family == "t5" else tokenizer).save_pretrained(tmp_path / "dense")
    names = run_card(tmp_path / "dense", tmp_path, how, monkeypatch)
    assert type(names["model"]).__name__ == type(dense).__name__
    again = pared.load(tmp_path / "merged")
    beside = {"decoder_input_ids": TOKENS} if isinstance(dense, T5ForConditionalGeneration) else {}
    with torch.no_grad():
        found = again(input_ids=TOKENS, **beside)[0]
        expected = names["merged"].eval()(input_ids=TOKENS, **beside)[0]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_the_card_of_a_model_with_code_of_its_own_says_that_it_runs(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    foreign(tmp_path / "dense", tokenizer, name="Carded")
    monkeypatch.setenv("PARED_TRUST_REMOTE_CODE", "1")
    run_card(tmp_path / "dense", tmp_path, HOWS["svd"], monkeypatch)
    card = (tmp_path / "made" / "README.md").read_text()
    assert card.count('AutoModelForCausalLM.from_pretrained("made", trust_remote_code=True)') == 2
