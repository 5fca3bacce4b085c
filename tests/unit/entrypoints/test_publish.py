"""Every folder that pared writes appears whole or not at all, checked by reloading, with room for one model only."""

import gc
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import TINY_MODELS
from transformers import PreTrainedModel, PreTrainedTokenizerFast

import pared
from pared.entrypoints import publish
from pared.models.source import ModelSource
from pared.schema.manifest import Fingerprint


@pytest.mark.parametrize("step", ["save", "reloaded", "seal", "model_card"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_whatever_stops_it_nothing_half_written_is_left(
    step: str,
    error: type[BaseException],
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fails(*_: object, **__: object) -> None:
        raise error

    result = pared.compress(TINY_MODELS["llama"](), tokenizer, method="svd", keep=0.5)
    result.save(tmp_path / "made")
    before = (tmp_path / "made" / "pared.json").read_bytes()
    monkeypatch.setattr(publish, step, fails)
    for folder, overwrite in (("made", True), ("new", False)):
        with pytest.raises(error):
            result.save(tmp_path / folder, overwrite)
    assert [path.name for path in tmp_path.iterdir()] == ["made"]
    assert (tmp_path / "made" / "pared.json").read_bytes() == before
    assert pared.verify(tmp_path / "made") <= 1e-6


def test_the_model_in_memory_is_gone_before_the_new_one_is_loaded(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There may be room for only one of them."""
    TINY_MODELS["llama"]().save_pretrained(tmp_path / "llama")
    tokenizer.save_pretrained(tmp_path / "llama")
    (tmp_path / "words.txt").write_text(" ".join(f"w{place % 64}" for place in range(200)))
    loaded: list[weakref.ref[PreTrainedModel]] = []
    load, reloaded = ModelSource.load, publish.reloaded

    def note(self: ModelSource, *arguments: Any) -> PreTrainedModel:
        model = load(self, *arguments)
        loaded.append(weakref.ref(model))
        return model

    def look(*arguments: Any) -> Any:
        gc.collect()
        assert [one() for one in loaded] == [None]
        return reloaded(*arguments)

    monkeypatch.setattr(ModelSource, "load", note)
    monkeypatch.setattr(publish, "reloaded", look)
    calibration = pared.Calibration(text=f"file:{tmp_path}/words.txt", samples=2, length=16)
    pared.run(
        pared.Recipe(
            model=str(tmp_path / "llama"), method="svd-llm", calibration=calibration, out=str(tmp_path / "made")
        )
    )
    assert len(loaded) == 2


def test_a_folder_is_published_from_whatever_writes_and_opens_it(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """A model that memory does not hold has a saver and a reloader of its own, which is open until the record is."""
    result = pared.compress(TINY_MODELS["llama"](), tokenizer, method="svd", keep=0.5)
    manifest = result.save(tmp_path / "made").manifest
    seen: list[str] = []

    def write(folder: Path) -> Fingerprint:
        seen.append("write")
        return publish.ResidentSaver(result.model, tokenizer, None)(folder)

    @contextmanager
    def reload(folder: Path, fingerprint: Fingerprint, source: str) -> Iterator[tuple[PreTrainedModel, float]]:
        seen.append("open")
        with publish.reload_resident(folder, fingerprint, source) as opened:
            yield opened
        seen.append("close")

    def measure(model: PreTrainedModel) -> float:
        seen.append("measure")
        return float(model(torch.arange(1, 9).unsqueeze(0)).logits.detach().sum())

    def record(reread: publish.Reread) -> pared.Manifest:
        seen.append("record")
        return manifest.model_copy(update={**reread.recorded, "perplexity_after": reread.perplexity})

    made = publish.Publication(tmp_path / "own", "it").publish(write, record, measure, reload)
    assert seen == ["write", "open", "measure", "record", "close"]
    assert made.perplexity_after is not None
    assert pared.verify(tmp_path / "own") <= 1e-6
