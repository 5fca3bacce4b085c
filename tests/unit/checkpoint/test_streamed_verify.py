"""A folder is verified block by block as it is as a whole: the same answers, the same faults found."""

import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from tiny_models import TINY_MODELS
from transformers import PreTrainedTokenizerFast

import pared
from pared.checkpoint.open_streamed import open_streamed
from pared.checkpoint.self_check import reopened
from pared.checkpoint.verify import compare, open_whole, take_fingerprint
from pared.errors import DamagedError, ParedError
from pared.models.source import find_model

MODULE = sys.modules["pared.checkpoint.verify"]  # the package has a function of that name


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    folder = tmp_path_factory.mktemp("dense")
    TINY_MODELS["qwen2"]().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=["svd", "magnitude"])
def folder(
    request: pytest.FixtureRequest,
    dense: Path,
    tmp_path_factory: pytest.TempPathFactory,
    tokenizer: PreTrainedTokenizerFast,
) -> Path:
    place = tmp_path_factory.mktemp("out") / "out"
    fields = {"sparsity": 0.5} if request.param == "magnitude" else {"keep": 0.6}
    method = "magnitude" if request.param == "magnitude" else "svd"
    recipe = pared.Recipe(method=method, model=str(dense), out=str(place), evaluation=None, **fields)
    pared.run(recipe)
    return place


@pytest.mark.parametrize("stream", ["on", "off", "auto"])
def test_a_whole_folder_is_verified(stream: str, folder: Path) -> None:
    assert pared.verify(folder, stream=stream) == 0.0


def test_fingerprints_are_the_same(folder: Path) -> None:
    store = open_streamed(find_model(str(folder)))
    fingerprint = take_fingerprint(store.model, store)
    assert fingerprint == take_fingerprint(pared.load(folder))
    assert compare(store.model, fingerprint, store) == 0.0
    assert all(parameter.is_meta for parameter in store.model.get_submodule(store.path).parameters())
    reread, difference = reopened(folder, fingerprint, "m")
    assert difference == 0.0
    assert len(reread) == len(store)


def test_layers_that_no_token_reaches_are_sampled_too(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MODULE, "_note_reached", lambda *_: iter(()))
    store = open_streamed(find_model(str(folder)))
    fingerprint = take_fingerprint(store.model, store)
    assert fingerprint.layers
    assert fingerprint == take_fingerprint(pared.load(folder))
    assert compare(store.model, fingerprint, store) == 0.0


def _changed(folder: Path, place: Path, value: float) -> Path:
    """Return a copy of a folder with one number changed, whose sums are those of the change."""
    place.mkdir()
    for file in folder.iterdir():
        (place / file.name).write_bytes(file.read_bytes())
    tensors = load_file(place / "model.safetensors")
    name = next(name for name in tensors if name.endswith(("down.weight", "values")))
    tensors[name].view(-1)[:4] = value
    save_file(tensors, place / "model.safetensors", metadata={"format": "pt"})
    pared.checkpoint.record(place)
    return place


@pytest.mark.parametrize("stream", ["on", "off"])
def test_another_model_is_found_out(stream: str, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DamagedError, match="self-check failed: the outputs of the loaded model differ"):
        pared.verify(_changed(folder, tmp_path / "changed", 50.0), stream=stream)


@pytest.mark.parametrize("stream", ["on", "off"])
def test_a_weight_that_is_no_number_is_found(stream: str, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ParedError, match="holds NaN or infinity in 4 of"):
        pared.verify(_changed(folder, tmp_path / "changed", float("nan")), stream=stream)


def test_what_fits_is_read_as_a_whole(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[Path] = []
    monkeypatch.setattr(MODULE, "open_whole", lambda path: opened.append(path) or open_whole(path))
    pared.verify(folder)
    assert not opened
    monkeypatch.setattr("pared.memory.available_memory", lambda: pared.memory.Available(1000, "a limit"))
    pared.verify(folder)
    assert opened == [folder]
