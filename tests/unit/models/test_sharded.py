"""What FSDP and tensor parallelism saved in shards is put together, with the bits that were saved."""

import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from tiny_models import TINY_MODELS
from tiny_tokenizer import tiny_tokenizer
from torch.distributed.checkpoint import HuggingFaceStorageWriter
from transformers import PreTrainedModel

import pared
import pared.models.twin
from pared import ParedError
from pared.checkpoint.open_streamed import open_streamed
from pared.models.source import find_model
from unit.cli.test_commands import pared as command

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PARED_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(pared.models.twin, "SHARD", 20_000)


def saved(folder: Path, form: str) -> PreTrainedModel:
    """Save a tiny model in shards beside its configuration."""
    model: PreTrainedModel = TINY_MODELS["llama"]()
    model.save_pretrained(folder)
    tiny_tokenizer(model.config.vocab_size).save_pretrained(folder)
    (folder / "model.safetensors").unlink()
    state: dict[str, Any] = model.state_dict()
    if form == "of transformers":
        dcp.save(state, storage_writer=HuggingFaceStorageWriter(str(folder), save_distributed=True))
    elif form == "of accelerate":
        dcp.save({"model": state}, checkpoint_id=folder / "pytorch_model_fsdp_0")
        dcp.save({"optimizer": {"step": torch.ones(1)}}, checkpoint_id=folder / "optimizer_0")
    elif form == "with an optimizer":
        dcp.save({"model": state, "optimizer": {"model.norm.weight": torch.ones(3)}}, checkpoint_id=folder)
    else:
        dcp.save(state, checkpoint_id=folder)
    return model


@pytest.mark.parametrize("form", ["of transformers", "of accelerate", "with an optimizer", "alone"])
def test_a_model_in_shards_is_loaded_as_it_was_saved(form: str, tmp_path: Path) -> None:
    expected = saved(tmp_path / "sharded", form).state_dict()
    found = pared.load(tmp_path / "sharded", trust_remote_code=True).state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    if form == "of transformers":
        store = open_streamed(find_model(str(tmp_path / "sharded")))
        assert torch.equal(store.load(1).mlp.up_proj.weight, expected["model.layers.1.mlp.up_proj.weight"])


def test_a_model_in_shards_is_exported_and_its_plan_puts_nothing_together(tmp_path: Path) -> None:
    expected = saved(tmp_path / "sharded", "of accelerate").state_dict()
    code, told, _ = command("plan", tmp_path / "sharded", "--method", "svd", "--keep", 0.5)
    assert code == 0, told
    assert not list(tmp_path.glob("cache/models/*"))
    pared.export(tmp_path / "sharded", tmp_path / "dense", trust_remote_code=True)
    found = pared.load(tmp_path / "dense").state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert pared.load_tokenizer(tmp_path / "dense")("a b").input_ids == tiny_tokenizer()("a b").input_ids


def test_a_pickled_list_of_shards_is_not_read_without_permission(tmp_path: Path) -> None:
    saved(tmp_path / "sharded", "alone")
    (tmp_path / "sharded" / ".metadata").write_bytes(pickle.dumps(_Malicious(tmp_path / "ran")))
    with pytest.raises(ParedError, match=r"is a pickle.*trust_remote_code=True.*accelerate merge-weights"):
        pared.load(tmp_path / "sharded")
    assert not (tmp_path / "ran").exists()


class _Malicious:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.mkdir, (self.path,)


def test_a_missing_shard_is_reported_and_no_twin_stays(tmp_path: Path) -> None:
    saved(tmp_path / "sharded", "alone")
    for shard in (tmp_path / "sharded").glob("*.distcp"):
        shard.unlink()
    with pytest.raises(ParedError, match=r"sharded: cannot be read as torch.distributed.checkpoint"):
        pared.load(tmp_path / "sharded", trust_remote_code=True)
    assert not list(tmp_path.glob("cache/models/*"))


def test_shards_without_a_configuration_are_refused_with_what_they_need(tmp_path: Path) -> None:
    saved(tmp_path / "sharded", "alone")
    shutil.copytree(tmp_path / "sharded", tmp_path / "bare")
    (tmp_path / "bare" / "config.json").unlink()
    with pytest.raises(ParedError, match=r"shards of torch.distributed.checkpoint need config.json and the tokenizer"):
        find_model(str(tmp_path / "bare"))
