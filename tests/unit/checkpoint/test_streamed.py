"""A model whose blocks come and go is the whole one, and its changed blocks are what save writes."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file
from tiny_models import REPEATED, TINY_MODELS
from torch import nn
from transformers import PreTrainedModel

import pared
from pared.checkpoint.open_streamed import open_streamed
from pared.checkpoint.save import mark, save, shared_tensors
from pared.checkpoint.streamed import StreamedBlocks
from pared.engine.install import install, install_group
from pared.errors import DamagedError, ParedError
from pared.lowrank import Factors
from pared.models.source import find_model
from pared.modules.replace import replace_module
from pared.modules.sparse import NMGroups, SparseLinear
from pared.structure.model import find_anatomy


def _saved(model: PreTrainedModel, folder: Path, **kwargs: object) -> Path:
    model.save_pretrained(folder, **kwargs)
    return folder


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _saved(TINY_MODELS["llama"](), tmp_path_factory.mktemp("llama"))


def _require_equal(store: StreamedBlocks, expected: PreTrainedModel) -> None:
    """Every tensor of the streamed model, block by block, is that of the one in memory, bit for bit."""
    ours, theirs = dict(store.model.named_buffers()), dict(expected.named_buffers())
    outside = dict(expected.named_parameters(remove_duplicate=False))
    for name, parameter in store.model.named_parameters(remove_duplicate=False):
        if not name.startswith(f"{store.path}."):
            assert not parameter.is_meta, name
            _require_same(name, parameter, outside[name])
    for index in range(len(store)):
        block, whole = store.load(index), expected.get_submodule(store.block_name(index))
        names = dict(whole.named_parameters())
        assert dict(block.named_parameters()).keys() == names.keys()
        for name, parameter in block.named_parameters():
            _require_same(name, parameter, names[name])
        theirs_inside = dict(whole.named_buffers())
        for name, buffer in block.named_buffers():
            _require_same(name, buffer, theirs_inside[name])
        store.release(index)
        assert all(parameter.is_meta for parameter in block.parameters())
    assert ours.keys() == theirs.keys()
    for name, buffer in ours.items():
        if not name.startswith(f"{store.path}."):
            _require_same(name, buffer, theirs[name])


def _require_same(name: str, ours: torch.Tensor, theirs: torch.Tensor) -> None:
    assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape), name
    assert ours.requires_grad == theirs.requires_grad, name
    assert torch.equal(ours, theirs), name
    assert ours.data_ptr() % 64 == theirs.data_ptr() % 64 or not ours.is_floating_point(), name  # products go by it


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2_moe", "albert", "albert_groups", "gemma3"])
def test_a_streamed_model_answers_as_the_whole_one(family: str, tmp_path: Path) -> None:
    source = find_model(str(_saved((TINY_MODELS | REPEATED)[family](), tmp_path)))
    store, ids = open_streamed(source), torch.arange(12).reshape(2, 6)
    with torch.no_grad():
        expected = source.load()(input_ids=ids)[0]
        with store.running():
            found = store.model(input_ids=ids)[0]
    assert torch.equal(found, expected)
    assert all(parameter.is_meta for parameter in store.model.get_submodule(store.path).parameters())


def test_a_block_that_is_expected_is_read_ahead(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr("os.posix_fadvise", lambda _, start, count, __: asked.append((start, count)), raising=False)
    monkeypatch.setattr("os.POSIX_FADV_WILLNEED", 3, raising=False)
    store = open_streamed(find_model(str(llama)))
    store.load(0)
    for index in (-1, 0, len(store)):  # none, there already, none
        store.expect(index)
    assert asked == []
    store.expect(1)
    assert sorted(asked) == sorted((one.start, one.nbytes) for one in store.stored(1).values())


@pytest.mark.parametrize("tied", [True, False])
def test_embeddings_are_given_up_and_read_again_as_they_were(tied: bool, tmp_path: Path) -> None:
    with torch.random.fork_rng():
        model = TINY_MODELS["llama"]()
        model.config.tie_word_embeddings = tied
        model = type(model)(model.config).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "model")
    store = open_streamed(find_model(str(tmp_path / "model")))
    ends = [store.model.get_input_embeddings(), store.model.get_output_embeddings()]
    before = [(module.weight, module.weight.detach().clone()) for module in ends]
    with store.without_embeddings():
        for module, (weight, values) in zip(ends, before, strict=True):
            assert module.weight is weight
            assert weight.shape == values.shape
            assert weight.isnan().all(), "what reads them all the same must not go unseen"
            assert weight.untyped_storage().nbytes() == 2
    for module, (weight, values) in zip(ends, before, strict=True):
        assert module.weight is weight
        assert torch.equal(weight, values)
    assert (ends[0].weight is ends[1].weight) == tied
    assert torch.equal(store.model.model.norm.weight, model.model.norm.weight)


def test_one_block_is_in_memory_while_the_model_runs(llama: Path) -> None:
    store = open_streamed(find_model(str(llama)))
    seen: list[list[bool]] = []
    blocks = [store.model.get_submodule(store.block_name(index)) for index in range(len(store))]

    def note(*_: object) -> None:
        seen.append([not next(block.parameters()).is_meta for block in blocks])

    handles = [block.register_forward_hook(note) for block in blocks]
    with store.running(), torch.no_grad():
        store.model(input_ids=torch.arange(6).unsqueeze(0))
    assert seen == [[True, False, False], [False, True, False], [False, False, True]]
    for handle in handles:
        handle.remove()
    assert not any(block._forward_pre_hooks for block in blocks)


def test_blocks_are_given_up_when_a_call_fails(llama: Path) -> None:
    store = open_streamed(find_model(str(llama)))
    block = store.model.get_submodule(store.block_name(1))

    def fail(*_: object) -> None:
        raise RuntimeError("no")

    handle = block.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="no"), store.running():
        store.model(input_ids=torch.arange(6).unsqueeze(0))
    handle.remove()
    assert all(parameter.is_meta for parameter in store.model.get_submodule(store.path).parameters())


def test_a_block_that_was_loaded_before_stays(llama: Path) -> None:
    store = open_streamed(find_model(str(llama)))
    block = store.load(1)
    assert store.load(1) is block
    with torch.no_grad():
        next(block.parameters()).add_(1)
        with store.running():
            store.model(input_ids=torch.arange(6).unsqueeze(0))
    assert not next(block.parameters()).is_meta


def test_what_was_changed_and_not_committed_is_gone(llama: Path) -> None:
    source = find_model(str(llama))
    store = open_streamed(source)
    block = store.load(0)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.add_(1)
    install(store.model, f"{store.block_name(0)}.mlp.up_proj", Factors(torch.randn(3, 32), torch.randn(48, 3)))
    store.release(0)
    _require_equal(store, source.load())


# What may stand in a block, by name: each puts it into any model of three blocks.
def _low_rank(model: PreTrainedModel, index: int) -> None:
    name = f"model.layers.{index}.mlp.up_proj"
    install(model, name, Factors(*_randn((3 + index, 32), (48, 3 + index))))


def _pivoted(model: PreTrainedModel, index: int) -> None:
    name = f"model.layers.{index}.mlp.down_proj"
    install(model, name, Factors(*_randn((5, 48), (32, 5))), pivoted=True)


def _sparse(model: PreTrainedModel, index: int, groups: NMGroups | None = None) -> None:
    for leaf in ("self_attn.q_proj", "self_attn.o_proj"):
        name = f"model.layers.{index}.{leaf}"
        layer = model.get_submodule(name)
        assert isinstance(layer, nn.Linear)
        mask = torch.arange(layer.weight.numel()).reshape(layer.weight.shape) % 4 < 2
        weight = layer.weight.detach() * mask
        replace_module(model, name, SparseLinear.of(weight, mask, None, groups))


def _grouped(model: PreTrainedModel, index: int) -> None:
    _sparse(model, index, NMGroups(2, 4))


def _dense(model: PreTrainedModel, index: int) -> None:
    with torch.no_grad():
        for parameter in model.get_submodule(f"model.layers.{index}").parameters():
            parameter.mul_(1.5)


CHANGES: dict[str, Callable[[PreTrainedModel, int], None]] = {
    "dense": _dense,
    "low rank": _low_rank,
    "pivoted": _pivoted,
    "sparse": _sparse,
    "2:4": _grouped,
}


def _randn(*shapes: tuple[int, int]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator) for shape in shapes]


@pytest.mark.parametrize("change", CHANGES)
def test_a_committed_block_is_read_as_it_was_changed(change: str, llama: Path, tmp_path: Path) -> None:
    source = find_model(str(llama))
    store, expected = open_streamed(source, folder=tmp_path), source.load()
    for index in range(len(store)):
        store.load(index)
        CHANGES[change](store.model, index)
        store.commit(index)
        CHANGES[change](expected, index)
    assert all(parameter.is_meta for parameter in store.model.get_submodule(store.path).parameters())
    _require_equal(store, expected)
    ids = torch.arange(6).unsqueeze(0)
    with torch.no_grad(), store.running():
        assert torch.equal(store.model(input_ids=ids)[0], expected(input_ids=ids)[0])


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_file_of_a_block_holds_what_save_pretrained_writes(
    change: str, dtype: str, llama: Path, tmp_path: Path
) -> None:
    source = find_model(str(llama))
    store, expected = open_streamed(source, dtype, folder=tmp_path), source.load(dtype)
    for model in (store.model, expected):
        if model is store.model:
            store.load(1)
        CHANGES[change](model, 1)
    store.commit(1)
    mark(expected)
    save(expected, None, tmp_path / "whole")
    whole, found = load_file(tmp_path / "whole" / "model.safetensors"), load_file(store.file_of(1))
    expected_names = {name for name, one in whole.items() if name.startswith("model.layers.1.") and one.numel()}
    assert found.keys() == expected_names
    for name in expected_names:
        assert torch.equal(found[name], whole[name])
        assert found[name].dtype == whole[name].dtype


def test_experts_that_are_merged_in_memory_are_written_as_they_were_read(tmp_path: Path) -> None:
    source = find_model(str(_saved(TINY_MODELS["qwen2_moe"](), tmp_path / "model")))
    before = load_file(tmp_path / "model" / "model.safetensors")
    store, expected = open_streamed(source, folder=tmp_path), source.load()
    for index in range(len(store)):
        store.load(index)
        store.commit(index)
        for name, tensor in load_file(store.file_of(index)).items():
            assert torch.equal(tensor, before[name]), name
    _require_equal(store, expected)


def _share(model: PreTrainedModel, indices: tuple[int, ...]) -> None:
    names = [f"model.layers.{index}.mlp.gate_proj" for index in indices]
    install_group(model, names, Factors(*_randn((4, 32), (48 * len(indices), 4))))


def test_a_basis_that_blocks_share_is_written_once_and_read_by_all(llama: Path, tmp_path: Path) -> None:
    source = find_model(str(llama))
    store, expected = open_streamed(source, folder=tmp_path), source.load()
    for index in (0, 1, 2):
        store.load(index)
    _share(store.model, (0, 1, 2))
    for index in (0, 1, 2):
        store.commit(index)
    _share(expected, (0, 1, 2))
    shared = shared_tensors(expected)
    assert len(shared) == 2
    assert shared_tensors(store.model) == shared
    _require_equal(store, expected)
    assert shared_tensors(store.model) == shared
    stored = [name for index in (0, 1, 2) for name in load_file(store.file_of(index))]
    assert [name for name in stored if name.endswith("gate_proj.down.weight")] == [
        "model.layers.0.mlp.gate_proj.down.weight"
    ]
    owner, member = store.load(0), store.load(1)
    assert owner.mlp.gate_proj.down.weight is member.mlp.gate_proj.down.weight  # as it is in a model in memory


@pytest.mark.parametrize("change", [*CHANGES, "shared"])
def test_another_process_goes_on_from_committed_blocks(change: str, llama: Path, tmp_path: Path) -> None:
    source = find_model(str(llama))
    first, expected = open_streamed(source, folder=tmp_path), source.load()
    for index in (0, 1):
        first.load(index)
    for model in (first.model, expected):
        if change == "shared":
            _share(model, (0, 1))
        else:
            for index in (0, 1):
                CHANGES[change](model, index)
    for index in (0, 1):
        first.commit(index)
    second = open_streamed(source, folder=tmp_path)
    for index in (0, 1):
        second.adopt(index, first.file_of(index))
    _require_equal(second, expected)
    assert shared_tensors(second.model) == shared_tensors(expected)


def test_passes_write_files_of_their_own(llama: Path, tmp_path: Path) -> None:
    source = find_model(str(llama))
    store, expected = open_streamed(source, folder=tmp_path), source.load()
    for number in (1, 2):
        store.passed = number
        store.load(0)
        _dense(store.model, 0)
        store.commit(0)
        _dense(expected, 0)
    assert sorted(os.listdir(tmp_path)) == ["pass-1-block-00000.safetensors", "pass-2-block-00000.safetensors"]
    _require_equal(store, expected)


@pytest.fixture(scope="module", params=[*CHANGES, "shared"])
def compressed(request: pytest.FixtureRequest, llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = find_model(str(llama)).load()
    if request.param == "shared":
        _share(model, (0, 2))
    else:
        CHANGES[request.param](model, 1)
    mark(model)
    folder = tmp_path_factory.mktemp("compressed")
    save(model, None, folder)
    return folder


@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
def test_a_folder_that_pared_made_is_read_block_by_block(compressed: Path, dtype: str) -> None:
    source = find_model(str(compressed))
    store, expected = open_streamed(source, dtype), pared.load(compressed, dtype)
    _require_equal(store, expected)
    ids = torch.arange(6).unsqueeze(0)
    with torch.no_grad(), store.running():
        assert torch.equal(store.model(input_ids=ids)[0], expected(input_ids=ids)[0])
    assert store.model.config.to_dict() == expected.config.to_dict()


def test_what_is_found_in_the_blocks_is_found_without_their_values(llama: Path) -> None:
    source = find_model(str(llama))
    assert find_anatomy(open_streamed(source).model) == find_anatomy(source.load())


def test_nothing_is_committed_without_a_folder_or_unread(llama: Path, tmp_path: Path) -> None:
    store = open_streamed(find_model(str(llama)))
    with pytest.raises(ParedError, match=r"block model.layers.1 is not in memory"):
        store.commit(1)
    store.load(1)
    with pytest.raises(ParedError, match="opened to be read"):
        store.commit(1)


def test_a_full_disk_leaves_a_block_as_it_was(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, os.strerror(28))

    store = open_streamed(find_model(str(llama)), folder=tmp_path)
    store.load(0)
    monkeypatch.setattr("pared.checkpoint.block_files.save_file", full)
    with pytest.raises(ParedError, match=r"pass-1-block-00000.safetensors cannot be written \(.*No space left"):
        store.commit(0)
    assert not list(tmp_path.iterdir())
    assert store.files[0] is None


def test_a_block_that_was_left_in_memory_is_adopted_without_what_was_read(llama: Path, tmp_path: Path) -> None:
    source = find_model(str(llama))
    first, second = open_streamed(source, folder=tmp_path), open_streamed(source, folder=tmp_path)
    first.load(0)
    CHANGES["low rank"](first.model, 0)
    first.commit(0)
    second.load(0)
    second.adopt(0, first.file_of(0))
    for (name, one), (_, two) in zip(first.tensors(), second.tensors(), strict=True):
        assert torch.equal(one, two), name


def test_a_file_of_something_else_is_not_adopted(llama: Path, tmp_path: Path) -> None:
    store = open_streamed(find_model(str(llama)), folder=tmp_path)
    with pytest.raises(DamagedError, match="was not written by pared for a block"):
        store.adopt(0, llama / "model.safetensors")


MEASURE = """
import sys
from pathlib import Path
from pared.checkpoint.open_streamed import open_streamed
from pared.models.source import find_model
import torch

def memory(key):
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024

source = find_model(sys.argv[1])
source.skeleton()  # what is imported is imported
Path("/proc/self/clear_refs").write_text("5")
before = memory("VmRSS")
store = open_streamed(source, folder=Path(sys.argv[2]))
for index in range(len(store)):
    store.load(index)
    store.commit(index)
with store.running(), torch.no_grad():
    store.model(input_ids=torch.arange(8).unsqueeze(0))
print(memory("VmHWM") - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="peaks cannot be measured here")
def test_reading_and_writing_takes_the_memory_of_a_few_blocks(tmp_path: Path) -> None:
    config = transformers.LlamaConfig(
        vocab_size=1000, hidden_size=512, intermediate_size=1376, num_hidden_layers=24, num_attention_heads=8
    )
    model = transformers.LlamaForCausalLM(config)  # 300 MB in 24 blocks
    _saved(model, tmp_path / "model")
    (tmp_path / "work").mkdir()
    block = sum(parameter.nbytes for parameter in model.get_submodule("model.layers.0").parameters())
    outside = sum(parameter.nbytes for parameter in model.parameters()) - 24 * block
    arguments = [sys.executable, "-c", MEASURE, str(tmp_path / "model"), str(tmp_path / "work")]
    run = subprocess.run(arguments, capture_output=True, text=True, check=True)
    assert int(run.stdout) < outside + 3 * block
