"""A calibration text that is too short for what is made of it is told of, in a line and in the manifest."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import TINY_MODELS
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import pared
from pared.data.windows import Windows, digest_of
from pared.engine.checks.enough import PER_FEATURE, too_few
from pared.engine.spec import resolve
from pared.report.results import too_few_line
from pared.schema.recipe import Calibration, Recipe
from pared.structure import find_anatomy
from pared.structure.probe import probe_shapes

WIDEST = 48  # features of the tiny Llama


def windows_of(tokens: torch.Tensor, mask: torch.Tensor | None = None) -> Windows:
    return Windows(tokens, digest_of(tokens), "words", "a test", stand_in=True, mask=mask)


def drawn(count: int, length: int = 24, vocabulary: int = 10**6) -> torch.Tensor:
    return torch.randint(1, vocabulary, (count, length), generator=torch.Generator().manual_seed(3))


def found(tokens: torch.Tensor, **fields: Any) -> Any:
    model = TINY_MODELS["llama"]()
    return too_few(windows_of(tokens), find_anatomy(model).with_assumed_reads(), resolve(Recipe(**fields)))


def test_a_token_is_told_from_another_by_itself_and_by_the_three_before_it() -> None:
    tokens = drawn(5)
    assert windows_of(tokens).distinct_tokens == tokens.numel()
    assert windows_of(tokens.repeat(3, 1)).distinct_tokens == tokens.numel()
    row = torch.tensor([[7] * 20])
    assert windows_of(row).distinct_tokens == 4  # the first three have fewer before them
    other = row.clone()
    other[0, 10] = 8
    assert windows_of(other).distinct_tokens == 4 + 4  # itself, and the three that it is before
    assert windows_of(tokens, torch.ones_like(tokens).tril()).distinct_tokens == int(
        torch.ones_like(tokens).tril().sum()
    )


def test_a_text_read_twice_is_no_longer_a_text() -> None:
    enough, half = PER_FEATURE * WIDEST // 24, PER_FEATURE * WIDEST // 24 // 2
    assert found(drawn(enough), method="loss-optimal") is None
    short = found(drawn(half), method="loss-optimal")
    assert short == found(drawn(half).repeat(4, 1), method="loss-optimal")
    # Down reads 48 features, and gate and up have gradients of as many; for the 32 of the others it is too short too.
    assert short == {"tokens": half * 24, "wanted": PER_FEATURE * WIDEST, "features": WIDEST, "layers": 21}


@pytest.mark.parametrize(
    ("fields", "features"),
    [
        ({"method": "loss-optimal"}, 48),
        ({"method": "loss-optimal", "structures": "mixed"}, 48),
        ({"method": "svd-llm"}, 32),  # of what reads 48 features it looks at the outputs
        ({"method": "sparsegpt", "sparsity": 0.5}, 48),
        ({"method": "asvd"}, None),
        ({"method": "wanda", "sparsity": 0.5}, None),
        ({"method": "svd"}, None),
    ],
    ids=str,
)
def test_only_what_is_solved_by_a_gram_takes_many_tokens(fields: dict[str, Any], features: int | None) -> None:
    short = found(drawn(1), **fields)
    assert (short is None) == (features is None)
    assert short is None or short["features"] == features


@pytest.mark.parametrize("method", ["svd-llm", "basis-sharing", "loss-optimal", "sparsegpt"])
def test_the_defaults_are_enough_for_the_embedded_model(method: str) -> None:
    """SmolLM2-135M has 1,536 channels an MLP; the shortest text that pared reads by default is its own."""
    config = LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=1, num_attention_heads=9,
        num_key_value_heads=3,
    )  # fmt: skip
    with torch.device("meta"):
        model = LlamaForCausalLM._from_config(config)
    anatomy = probe_shapes(model, find_anatomy(model))
    default = Calibration()
    assert default.samples is not None
    sparsity = {"sparsity": 0.5} if method == "sparsegpt" else {}
    spec = resolve(Recipe(method=method, **sparsity))
    least = PER_FEATURE * (576 if method in ("svd-llm", "basis-sharing") else 1536)
    assert default.samples * default.length > 5 * least
    assert too_few(windows_of(drawn(64, 1024)), anatomy, spec) is None
    short = too_few(windows_of(drawn(3, 1024)), anatomy, spec)
    assert short is not None
    assert short["wanted"] == least


def test_it_is_told_before_anything_is_solved_and_recorded(
    tokenizer: PreTrainedTokenizerFast, calibration: pared.Calibration, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    TINY_MODELS["llama"]().save_pretrained(tmp_path / "dense")
    tokenizer.save_pretrained(tmp_path / "dense")
    recipe: Callable[..., Recipe] = lambda out, **more: Recipe(  # noqa: E731
        model=str(tmp_path / "dense"), out=str(tmp_path / out), evaluation=None, calibration=calibration, **more
    )
    outcome = pared.run(recipe("small", method="loss-optimal"))
    few = json.loads((tmp_path / "small" / "pared.json").read_text())["too_few"]
    assert few["wanted"] == PER_FEATURE * WIDEST
    assert few["tokens"] <= 7 * 16
    line = too_few_line(few)
    assert "\n" not in line
    assert f"too few calibration tokens: {few['tokens']} distinct ones" in line
    assert f"{PER_FEATURE} tokens a feature, {PER_FEATURE * WIDEST}; raise" in line
    assert line in " ".join(str(outcome).split())
    assert pared.run(recipe("plain", method="svd")).manifest.too_few is None
