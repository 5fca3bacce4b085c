"""A configuration that names no class names the one it can only be, or is told about in one line."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import TINY_MODELS
from tiny_tokenizer import tiny_tokenizer

import pared
from pared import ParedError
from pared.models import find_model


def saved(folder: Path, kind: str, architectures: Any) -> str:
    TINY_MODELS[kind]().save_pretrained(folder)
    tiny_tokenizer(64).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config.pop("architectures")
    if architectures is not None:
        config["architectures"] = architectures
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


@pytest.mark.parametrize(("kind", "architectures"), [("llama", None), ("gpt2", [])])
def test_a_decoder_without_architectures_is_its_language_model(kind: str, architectures: Any, tmp_path: Path) -> None:
    name = saved(tmp_path / "model", kind, architectures)
    loaded = pared.load(name)
    assert type(loaded) is type(TINY_MODELS[kind]())
    outcome = pared.run(pared.Recipe(model=name, method="svd", keep=0.6, out=str(tmp_path / "out"),
                                     evaluation=pared.Evaluation(text="embedded", length=16, windows=2)))  # fmt: skip
    assert outcome.manifest.perplexity_after is not None
    assert pared.verify(outcome.folder) < 1e-3


@pytest.mark.parametrize(
    ("architectures", "message"),
    [
        (None, "names no architectures, and a 'bert' can be one of several: add the one that was saved"),
        ([], "names no architectures"),
        ([3], "expected names of classes"),
        ("BertForMaskedLM", "expected names of classes"),
        ({"a": 1}, "expected names of classes"),
    ],
)
def test_what_cannot_be_derived_is_told(architectures: Any, message: str, tmp_path: Path) -> None:
    name = saved(tmp_path / "model", "bert", architectures)
    with pytest.raises(ParedError, match=message):
        find_model(name).load()


def test_a_model_in_memory_needs_none(tmp_path: Path) -> None:
    model = TINY_MODELS["llama"]()
    model.config.architectures = None
    pared.compress(model, tiny_tokenizer(64), pared.Recipe(method="svd", keep=0.6))
    model.save_pretrained(tmp_path)
    loaded, ids = pared.load(str(tmp_path)), torch.arange(3, 12)[None]
    with torch.no_grad():
        assert torch.allclose(loaded(ids).logits, model(ids).logits, atol=1e-5)
