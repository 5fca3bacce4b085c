"""A model that is opened to be read block by block is the one that from_pretrained loads, or is refused."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny_models import FAMILIES, REPEATED, TINY_MODELS

from pared.checkpoint.open_streamed import open_streamed
from pared.errors import DamagedError, ParedError
from pared.models.source import find_model

from .test_streamed import _require_equal, _saved


@pytest.mark.parametrize("family", [*FAMILIES, *REPEATED])
def test_every_weight_and_buffer_is_that_of_from_pretrained(family: str, tmp_path: Path) -> None:
    source = find_model(str(_saved((TINY_MODELS | REPEATED)[family](), tmp_path)))
    store, expected = open_streamed(source), source.load()
    _require_equal(store, expected)
    assert type(store.model) is type(expected)
    assert not store.model.training
    assert store.model.config.to_dict() == expected.config.to_dict()
    if expected.can_generate():
        assert store.model.generation_config.to_dict() == expected.generation_config.to_dict()


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3", "qwen2_moe", "bert"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_dtypes_are_those_of_from_pretrained(family: str, dtype: str, tmp_path: Path) -> None:
    source = find_model(str(_saved(TINY_MODELS[family](), tmp_path)))
    _require_equal(open_streamed(source, dtype), source.load(dtype))


def test_shards_are_read_by_their_index(tmp_path: Path) -> None:
    source = find_model(str(_saved(TINY_MODELS["qwen2_moe"](), tmp_path, max_shard_size="30KB")))
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    _require_equal(open_streamed(source), source.load())


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "linear", "factor": 2.0},
        {"rope_type": "dynamic", "factor": 2.0},
        {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
         "original_max_position_embeddings": 64},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
    ],
    ids=lambda rope: str(rope["rope_type"]),
)  # fmt: skip
def test_rotary_tables_of_scaled_positions_are_those_of_from_pretrained(
    rope: dict[str, object], tmp_path: Path
) -> None:
    config = TINY_MODELS["llama"]().config
    config.rope_parameters = {"rope_theta": 10000.0, **rope}
    source = find_model(str(_saved(transformers.LlamaForCausalLM(config), tmp_path)))
    _require_equal(open_streamed(source, "bfloat16"), source.load("bfloat16"))


def test_a_base_model_is_read_into_the_model_with_a_head(tmp_path: Path) -> None:
    model = TINY_MODELS["qwen3"]()  # its head is its embedding
    tensors = {
        name.removeprefix("model."): value for name, value in model.state_dict().items() if "lm_head" not in name
    }
    _saved(model, tmp_path)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    source = find_model(str(tmp_path))
    store = open_streamed(source)
    _require_equal(store, source.load())
    assert store.model.get_input_embeddings().weight is store.model.get_output_embeddings().weight


def _sharded(tmp_path: Path) -> Path:
    return _saved(TINY_MODELS["llama"](), tmp_path / "model", max_shard_size="20KB")


def test_a_missing_shard_is_told_by_its_name(tmp_path: Path) -> None:
    folder = _sharded(tmp_path)
    file = sorted(folder.glob("model-*.safetensors"))[2]
    file.unlink()
    with pytest.raises(DamagedError, match=rf"{file.name}, which its index lists, is missing; fetch it again"):
        open_streamed(find_model(str(folder)))


@pytest.mark.parametrize("damage", ["vanished", "truncated"])
def test_a_shard_that_is_damaged_while_it_is_read_is_told(damage: str, tmp_path: Path) -> None:
    folder = _sharded(tmp_path)
    store = open_streamed(find_model(str(folder)))
    file = store.stored(1)["model.layers.1.mlp.up_proj.weight"].file
    if damage == "vanished":
        file.unlink()
    else:
        os.truncate(file, file.stat().st_size - 100)
    with pytest.raises(DamagedError, match=rf"{file.name} is missing, unreadable or truncated"):
        store.load(1)
    assert all(parameter.is_meta for parameter in store.model.get_submodule(store.block_name(1)).parameters())


def test_a_missing_weight_is_told(tmp_path: Path) -> None:
    folder = _saved(TINY_MODELS["llama"](), tmp_path)
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(DamagedError, match=r"1 weights are missing .* 'model.layers.1.mlp.up_proj.weight'"):
        open_streamed(find_model(str(folder)))


def test_a_weight_of_another_shape_is_told(tmp_path: Path) -> None:
    folder = _saved(TINY_MODELS["llama"](), tmp_path)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"] = torch.zeros(3, 32)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    store = open_streamed(find_model(str(folder)))
    with pytest.raises(
        DamagedError, match=r"up_proj.weight of model.safetensors is \(3, 32\), the model's .* is \(48, 32\)"
    ):
        store.load(1)


def _pickled(folder: Path, shards: int, dtype: torch.dtype | None = None, old: bool = False) -> Path:
    """Have the weights of a folder in files of ``torch.save``, without safetensors."""
    tensors = load_file(folder / "model.safetensors")
    tensors = {name: tensor.to(dtype or tensor.dtype) for name, tensor in tensors.items()}
    names = [f"pytorch_model-{n + 1:05d}-of-{shards:05d}.bin" for n in range(shards)]
    weight_map = {name: names[n % shards] for n, name in enumerate(tensors)}
    for file in names:
        part = {name: tensor for name, tensor in tensors.items() if weight_map[name] == file}
        torch.save(part, folder / file, _use_new_zipfile_serialization=not old)
    (folder / "model.safetensors").unlink()
    if shards == 1:
        (folder / names[0]).rename(folder / "pytorch_model.bin")
    else:
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


@pytest.mark.parametrize(("family", "shards"), [("llama", 1), ("gpt2", 3), ("qwen2_moe", 3)])
def test_weights_that_torch_saved_are_read_as_from_pretrained_does(family: str, shards: int, tmp_path: Path) -> None:
    source = find_model(str(_pickled(_saved(TINY_MODELS[family](), tmp_path), shards)))
    _require_equal(open_streamed(source), source.load())


def test_dtypes_of_what_torch_saved_are_those_of_from_pretrained(tmp_path: Path) -> None:
    source = find_model(str(_pickled(_saved(TINY_MODELS["llama"](), tmp_path), 1, torch.bfloat16)))
    for dtype in ("auto", "bfloat16", "float16"):
        _require_equal(open_streamed(source, dtype), source.load(dtype))


def test_code_in_what_torch_saved_does_not_run(tmp_path: Path) -> None:
    folder = _pickled(_saved(TINY_MODELS["llama"](), tmp_path), 1)
    (folder / "pytorch_model.bin").unlink()
    torch.save({"weight": _Malicious(tmp_path / "ran")}, folder / "pytorch_model.bin")
    with pytest.raises(DamagedError, match=r"pytorch_model.bin is missing, unreadable or truncated \(Unpickling"):
        open_streamed(find_model(str(folder)))
    assert not (tmp_path / "ran").exists()


class _Malicious:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[[Path], None], tuple[Path]]:
        return Path.mkdir, (self.path,)


@pytest.mark.parametrize("damage", ["old form", "transposed", "truncated", "not there"])
def test_weights_that_cannot_be_read_block_by_block_are_refused_with_what_to_do(damage: str, tmp_path: Path) -> None:
    folder = _pickled(_saved(TINY_MODELS["llama"](), tmp_path), 1, old=damage == "old form")
    file, error = folder / "pytorch_model.bin", ParedError
    if damage == "old form":
        told = "in the form of torch before 1.6.*pared export.*stream"
    elif damage == "transposed":
        tensors = torch.load(file)
        torch.save(tensors | {"lm_head.weight": tensors["lm_head.weight"].T.contiguous().T}, file)
        told = "has lm_head.weight in an order of its own.*pared export.*stream"
    elif damage == "truncated":
        file.write_bytes(file.read_bytes()[:-20_000])
        error, told = DamagedError, "pytorch_model.bin is missing, unreadable or truncated"
    else:
        file.rename(folder / "weights.bin")
        told = (
            "no weights that can be read block by block, which are model.safetensors or pytorch_model.bin.*pared export"
        )
    with pytest.raises(error, match=told):
        open_streamed(find_model(str(folder)))
