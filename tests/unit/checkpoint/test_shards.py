"""A folder put together of blocks' files is the folder that save writes, but for the number of files."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import TINY_MODELS
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

import pared
from pared.checkpoint.open_streamed import open_streamed
from pared.checkpoint.save import mark, save
from pared.checkpoint.shards import save_streamed
from pared.checkpoint.streamed import StreamedBlocks
from pared.checkpoint.verify import require_tensors
from pared.errors import ParedError
from pared.models.source import find_model

from .test_streamed import CHANGES, _saved, _share


def _change(model: PreTrainedModel, change: str) -> None:
    if change == "shared":
        _share(model, (0, 2))
    else:
        CHANGES[change](model, 1)


def _streamed(source: Path, work: Path, change: str, dtype: str = "auto") -> StreamedBlocks:
    store = open_streamed(find_model(str(source)), dtype, work)
    changed = (0, 2) if change == "shared" else (1,)
    for index in changed:
        store.load(index)
    _change(store.model, change)
    for index in changed:
        store.commit(index)
    mark(store.model)
    return store


@pytest.mark.parametrize("change", [*CHANGES, "shared"])
@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
def test_the_folder_holds_what_save_writes(
    change: str, dtype: str, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    source = find_model(str(_saved(TINY_MODELS["llama"](), tmp_path / "source")))
    (tmp_path / "work").mkdir()
    whole = source.load(dtype)
    _change(whole, change)
    mark(whole)
    save(whole, tokenizer, tmp_path / "whole", source)
    save_streamed(_streamed(tmp_path / "source", tmp_path / "work", change, dtype), tokenizer, tmp_path / "out", source)

    weights = [*(tmp_path / "out").glob("*.safetensors")]
    assert sorted(file.name for file in weights) == [
        f"model-0000{number}-of-00004.safetensors" for number in (1, 2, 3, 4)
    ]
    found: dict[str, torch.Tensor] = {}
    for file in weights:
        found |= load_file(file)
    expected = load_file(tmp_path / "whole" / "model.safetensors")
    assert found.keys() == expected.keys()
    assert all(found[name].dtype == expected[name].dtype and torch.equal(found[name], expected[name]) for name in found)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == expected.keys()
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in expected.values())
    assert index["metadata"]["total_parameters"] == whole.num_parameters()
    others = {file.name for file in (tmp_path / "whole").iterdir()} - {"model.safetensors"}
    assert others == {file.name for file in (tmp_path / "out").iterdir()} - {
        "model.safetensors.index.json",
        *(file.name for file in weights),
    }
    for name in others:
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "out" / name).read_bytes(), name


@pytest.mark.parametrize("change", [*CHANGES, "shared"])
def test_it_loads_as_every_other_folder(change: str, tmp_path: Path) -> None:
    source = find_model(str(_saved(TINY_MODELS["llama"](), tmp_path / "source")))
    (tmp_path / "work").mkdir()
    whole = source.load()
    _change(whole, change)
    save_streamed(_streamed(tmp_path / "source", tmp_path / "work", change), None, tmp_path / "out")
    require_tensors(tmp_path / "out")
    ids = torch.arange(6).unsqueeze(0)
    with torch.no_grad():
        expected = whole(input_ids=ids).logits
        assert torch.equal(pared.load(tmp_path / "out")(input_ids=ids).logits, expected)
        plain, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
        assert torch.equal(plain(input_ids=ids).logits, expected)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))


@pytest.mark.parametrize("family", ["qwen2_moe", "qwen3", "gpt2", "bert"])
def test_other_architectures_are_written_as_save_writes_them(family: str, tmp_path: Path) -> None:
    source = find_model(str(_saved(TINY_MODELS[family](), tmp_path / "source")))
    (tmp_path / "work").mkdir()
    store = open_streamed(source, folder=tmp_path / "work")
    mark(store.model)
    save_streamed(store, None, tmp_path / "out", source)
    found: dict[str, torch.Tensor] = {}
    for file in (tmp_path / "out").glob("*.safetensors"):
        found |= load_file(file)
    expected = load_file(tmp_path / "source" / "model.safetensors")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)


def test_files_of_blocks_that_go_afterwards_are_not_copied(tmp_path: Path) -> None:
    _saved(TINY_MODELS["llama"](), tmp_path / "source")
    (tmp_path / "work").mkdir()
    store = _streamed(tmp_path / "source", tmp_path / "work", "low rank")
    save_streamed(store, None, tmp_path / "out", link=True)
    for file, shard in zip(store.files, sorted((tmp_path / "out").glob("*.safetensors"))[1:], strict=True):
        assert file is not None
        assert os.path.samefile(file, shard)


def test_two_folders_of_one_model_share_no_file(tmp_path: Path) -> None:
    _saved(TINY_MODELS["llama"](), tmp_path / "source")
    (tmp_path / "work").mkdir()
    store = _streamed(tmp_path / "source", tmp_path / "work", "low rank")
    for name in ("one", "two"):
        save_streamed(store, None, tmp_path / name)
    files = [path.stat() for name in ("one", "two", "work") for path in (tmp_path / name).glob("*.safetensors")]
    assert len({file.st_ino for file in files}) == len(files)


def test_where_no_file_has_two_names_it_is_copied_and_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> None:
        raise OSError(1, "no links here")

    _saved(TINY_MODELS["llama"](), tmp_path / "source")
    (tmp_path / "work").mkdir()
    store = _streamed(tmp_path / "source", tmp_path / "work", "low rank")
    monkeypatch.setattr(os, "link", refused)
    save_streamed(store, None, tmp_path / "out", link=True)
    files = [file for file in store.files if file is not None]
    assert len(files) == len(store)
    for file, shard in zip(files, sorted((tmp_path / "out").glob("*.safetensors"))[1:], strict=True):
        assert file.read_bytes() == shard.read_bytes()  # what a kill now leaves can be gone on from
    full = shutil.disk_usage(tmp_path)._replace(free=0)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: full)
    with pytest.raises(ParedError, match=r"not enough disk for a copy of pass-1-block-00000.*bytes needed, 0 free"):
        save_streamed(store, None, tmp_path / "full", link=True)


def test_what_is_outside_of_the_blocks_may_take_several_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _saved(TINY_MODELS["llama"](), tmp_path / "source")
    (tmp_path / "work").mkdir()
    monkeypatch.setattr("pared.checkpoint.shards.SHARD_SIZE", "5KB")
    store = _streamed(tmp_path / "source", tmp_path / "work", "low rank")
    save_streamed(store, None, tmp_path / "out")
    names = sorted(file.name for file in (tmp_path / "out").glob("*.safetensors"))
    assert len(names) > 4
    assert names == [f"model-{number:05d}-of-{len(names):05d}.safetensors" for number in range(1, len(names) + 1)]
    shutil.rmtree(tmp_path / "work")
    pared.load(tmp_path / "out")
