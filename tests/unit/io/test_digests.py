"""One digest for all of the code: every byte that loading may read counts, and nothing else does."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch
from tiny_models import TINY_MODELS
from transformers import PreTrainedTokenizerFast

from pared.io import digests
from pared.io.digests import file_digest, folder_digest, model_digest, sha256_of
from pared.models.source import find_model


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    folder = tmp_path_factory.mktemp("model")
    TINY_MODELS["llama"]().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def model(saved: Path, tmp_path: Path) -> Path:
    return shutil.copytree(saved, tmp_path / "model")


def binary(folder: Path, seed: int, name: str = "pytorch_model.bin") -> None:
    generator = torch.Generator().manual_seed(seed)
    torch.save({"norm": torch.randn(8, generator=generator)}, folder / name)


def one_norm(folder: Path) -> None:
    path = folder / "model.safetensors"
    tensors = safetensors.torch.load_file(path)
    tensors["model.norm.weight"][3] += 2**-20
    safetensors.torch.save_file(tensors, path, {"format": "pt"})


def flipped(name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        content = bytearray((folder / name).read_bytes())
        content[len(content) // 2] ^= 1
        (folder / name).write_bytes(bytes(content))

    return change


CHANGES: dict[str, Callable[[Path], None]] = {
    "one norm of safetensors": one_norm,
    "a .bin more": lambda folder: binary(folder, 1),
    "a shard": lambda folder: binary(folder, 1, "pytorch_model-00002-of-00002.bin"),
    "an adapter": lambda folder: binary(folder, 1, "adapter_model.bin"),
    "gguf": lambda folder: (folder / "model.gguf").write_bytes(b"GGUF"),
    "the tokenizer": flipped("tokenizer.json"),
    "the configuration": flipped("config.json"),
    "remote code": lambda folder: (folder / "modeling_own.py").write_text("x = 1"),
    "an optimiser that is code": lambda folder: (folder / "optimizer_utils.py").write_text("x = 1"),
    "a scheduler that is code": lambda folder: (folder / "scheduler.py").write_text("x = 1"),
    "a configuration of a scheduler": lambda folder: (folder / "scheduler_config.json").write_text("{}"),
    "code called like a note": lambda folder: (folder / "README_utils.py").write_text("x = 1"),
    "code in a folder": lambda folder: ((folder / "parts").mkdir(), (folder / "parts/own.py").write_text("x"))[0],
}


@pytest.mark.parametrize("change", CHANGES)
def test_every_byte_that_loading_may_read_changes_the_digest(model: Path, change: str) -> None:
    """Regression: a continued `pared eval` told the old model's scores of a model with one norm edited."""
    before = find_model(str(model)).digest()
    CHANGES[change](model)
    assert find_model(str(model)).digest() != before


def test_two_binary_models_of_one_configuration_differ(model: Path) -> None:
    """Regression: only *.safetensors were looked at."""
    (model / "model.safetensors").unlink()
    found = set()
    for seed in (1, 2):
        binary(model, seed)
        found.add(find_model(str(model)).digest())
    assert len(found) == 2


def test_place_notes_and_checkpoints_inside_do_not_count(model: Path, tmp_path: Path) -> None:
    before = folder_digest(model)
    (model / "README.md").write_text("notes")
    (model / "trainer_state.json").write_text("{}")
    (model / "optimizer.pt").write_bytes(b"state")
    (model / "checkpoint-5").mkdir()
    (model / "checkpoint-5" / "config.json").write_text("{}")
    assert folder_digest(model) == before
    assert folder_digest(model.rename(tmp_path / "elsewhere")) == before


def test_an_adapter_counts_with_the_model_it_is_for(model: Path, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(model)}))
    before = folder_digest(adapter)
    one_norm(model)
    assert folder_digest(adapter) != before


def test_code_in_a_folder_that_is_a_link_counts(model: Path, tmp_path: Path) -> None:
    """Regression: remote code behind a link could change unseen."""
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts" / "own.py").write_text("x = 1")
    (tmp_path / "parts" / "circle").symlink_to(model)
    plain = folder_digest(model)
    (model / "parts").symlink_to(tmp_path / "parts")
    before = folder_digest(model)
    (tmp_path / "parts" / "own.py").write_text("x = 2")
    assert len({plain, before, folder_digest(model)}) == 3


def test_adapters_that_name_each_other_have_a_digest(tmp_path: Path) -> None:
    """Regression: RecursionError."""
    for name, other in (("a", "b"), ("b", "a")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
        (tmp_path / name / "adapter_config.json").write_text(
            json.dumps({"base_model_name_or_path": f"{tmp_path}/{other}"})
        )
    assert folder_digest(tmp_path / "a") != folder_digest(tmp_path / "b")


@pytest.mark.parametrize(
    "content",
    ["[" * 100_000, "", "[]", '"x"', "9" * 5000, *({"base_model_name_or_path": name} for name in (
        "~nosuchuser/x", "x\0y", "x" * 300, "/", 3, None, [], "."))],
    ids=lambda content: str(content)[:40],
)  # fmt: skip
def test_a_damaged_or_hostile_adapter_has_a_digest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: object
) -> None:
    """Regression: RecursionError of deep JSON, RuntimeError of ~nosuchuser, all of a disk hashed for a base of "/"."""
    monkeypatch.chdir(tmp_path)
    config = tmp_path / "adapter_config.json"
    config.write_text(content if isinstance(content, str) else json.dumps(content))
    first = folder_digest(tmp_path)
    (tmp_path / "more.py").write_text("x")
    assert folder_digest(tmp_path) != first


def test_a_pipe_in_place_of_an_adapters_configuration_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "adapter_config.json")
    (tmp_path / "adapter_model.bin").write_bytes(b"x")
    assert folder_digest(tmp_path)


def test_a_digest_is_kept_and_followed_by_every_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digests, "SETTLED_NS", -1)
    reads: list[Path] = []
    monkeypatch.setattr(digests, "sha256_of", lambda path: (reads.append(path), sha256_of(path))[1])
    path = tmp_path / "weights.bin"
    path.write_bytes(b"one")
    first = file_digest(path)
    assert file_digest(path) == first == sha256_of(path)
    assert len(reads) == 1
    times = path.stat()
    path.write_bytes(b"two")
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))  # cp --preserve, rsync, a careful editor
    assert file_digest(path) == sha256_of(path) != first


def test_a_digest_of_a_file_that_was_just_written_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second change within one tick of the clock would not be seen."""
    monkeypatch.setenv("PARED_CACHE", str(tmp_path / "cache"))
    (tmp_path / "weights.bin").write_bytes(b"one")
    file_digest(tmp_path / "weights.bin")
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("damage", [b"", b"{", b"null", b'{"key": 1}', b"\xff\xfe", b"other"])
def test_a_damaged_cache_is_ignored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: bytes) -> None:
    monkeypatch.setattr(digests, "SETTLED_NS", -1)
    monkeypatch.setenv("PARED_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "weights.bin"
    path.write_bytes(b"one")
    right = file_digest(path)
    (kept,) = (tmp_path / "cache" / "digests").iterdir()
    kept.write_bytes(kept.read_bytes().replace(right[:8].encode(), b"00000000") if damage == b"other" else damage)
    assert file_digest(path) == right


def test_a_cache_that_cannot_be_written_is_no_reason_to_stop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digests, "SETTLED_NS", -1)
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("PARED_CACHE", str(tmp_path / "file" / "cache"))
    assert file_digest(tmp_path / "file") == sha256_of(tmp_path / "file")


def test_a_model_in_memory_is_told_by_its_tensors_and_its_configuration() -> None:
    first, second = TINY_MODELS["llama"](), TINY_MODELS["llama"]()
    assert model_digest(first) == model_digest(second)
    with torch.no_grad():
        second.model.norm.weight[0] += 2**-20
    assert model_digest(first) != model_digest(second)
    third = TINY_MODELS["llama"]()
    third.config.rms_norm_eps *= 2  # the same tensors, other answers
    assert model_digest(first) != model_digest(third)


def test_equal_sums_do_not_make_equal_models() -> None:
    """Regression: what the sensitivity allocation kept was told by two sums of every tensor."""
    first, second = TINY_MODELS["llama"](), TINY_MODELS["llama"]()
    with torch.no_grad():
        weight = second.model.layers[0].mlp.up_proj.weight
        weight.copy_(weight.flip(0))
    assert model_digest(first) != model_digest(second)
