"""Models with an encoder and a decoder: methods that need no data take either stack, the others say why not."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_tokenizer import tiny_tokenizer
from transformers import BartConfig, BartForConditionalGeneration, PreTrainedModel, T5Config, T5ForConditionalGeneration

import pared
from pared import ParedError, Recipe
from unit.cli.test_commands import pared as command
from unit.cli.test_commands import refused

WORDS = 64
STACKS = {"t5": ("decoder.block", "encoder.block"), "bart": ("model.decoder.layers", "model.encoder.layers")}
DATA_FREE: dict[str, dict[str, Any]] = {
    "svd": {"method": "svd", "keep": 0.6},
    "svd by loss": {"method": "svd", "keep": 0.6, "allocation": "loss"},
    "magnitude": {"method": "magnitude", "sparsity": 0.5},
    "magnitude 2:4": {"method": "magnitude", "pattern": "2:4"},
}
CALIBRATED: dict[str, dict[str, Any]] = {
    "default": {},
    "svd-llm": {"method": "svd-llm"},
    "wanda": {"method": "wanda", "sparsity": 0.5},
    "a refit": {"method": "svd", "refit": "update"},
    "trials": {"method": "svd", "allocation": "sensitivity"},
    "scores": {"method": "magnitude", "sparsity": 0.5, "allocation": "owl"},
}


def tiny(family: str) -> PreTrainedModel:
    torch.manual_seed(0)
    if family == "t5":
        shape = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_decoder_layers": 3, "num_heads": 4}
        return T5ForConditionalGeneration(T5Config(vocab_size=WORDS, decoder_start_token_id=0, **shape)).eval()
    sides = {f"{side}_{what}": n for side in ("encoder", "decoder")
             for what, n in (("layers", 2), ("attention_heads", 4), ("ffn_dim", 64))}  # fmt: skip
    return BartForConditionalGeneration(BartConfig(vocab_size=WORDS, d_model=32, **sides)).eval()


@pytest.fixture(scope="module", params=STACKS)
def dense(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("dense") / request.param
    tiny(request.param).save_pretrained(folder)
    tiny_tokenizer(WORDS).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("fields", DATA_FREE.values(), ids=DATA_FREE)
@pytest.mark.parametrize("family", STACKS)
def test_what_needs_no_data_compresses_the_decoder_and_the_encoder_if_it_is_named(
    family: str, fields: dict[str, Any]
) -> None:
    decoder, encoder = STACKS[family]
    for blocks, stack in ((None, decoder), (encoder, encoder)):
        result = pared.compress(tiny(family), tiny_tokenizer(WORDS), Recipe.of({**fields, "blocks": blocks}))
        assert {site.name.startswith(f"{stack}.") for site in result.plan.sites} == {True}
        assert result.plan.achieved_keep < 0.7


@pytest.mark.parametrize("fields", CALIBRATED.values(), ids=CALIBRATED)
def test_what_calibrates_is_refused_alike_by_all_that_plan_or_compress(
    dense: Path, tmp_path: Path, fields: dict[str, Any]
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps({**fields, "model": str(dense), "out": str(tmp_path / "out")}))
    told = ("encoder-decoder", "--method svd", "--method magnitude")
    refused(command("plan", "--recipe", recipe), *told)
    refused(command("compress", "--recipe", recipe), *told)
    with pytest.raises(ParedError, match="encoder-decoder"):
        pared.compress(tiny(dense.name), tiny_tokenizer(WORDS), Recipe.of(fields))


@pytest.mark.parametrize("words", [("--method", "svd", "--keep", 0.6), ("--method", "magnitude", "--sparsity", 0.5)])
def test_a_folder_is_planned_made_checked_and_loaded(dense: Path, tmp_path: Path, words: tuple[Any, ...]) -> None:
    decoder, encoder = STACKS[dense.name]
    code, told, _ = command("plan", dense, *words, "--json", tmp_path / "plan.json")
    assert code == 0
    assert f"compressed are the blocks of {decoder}; left alone are {encoder}" in told
    code, _, noted = command("compress", dense, *words, "--out", tmp_path / "out")
    assert code == 0, noted
    assert f"compressed are the blocks of {decoder}; left alone are {encoder}" in noted
    sizes = [json.loads((tmp_path / name).read_text()) for name in ("plan.json", "out/pared.json")]
    assert sizes[0]["sites"][0]["name"] == sizes[1]["plan"]["sites"][0]["name"]
    assert command("verify", tmp_path / "out")[0] == 0
    ids = torch.tensor([[1, 5, 9]])
    with torch.no_grad():
        logits = pared.load(tmp_path / "out")(input_ids=ids, decoder_input_ids=ids).logits
    assert logits.isfinite().all()
