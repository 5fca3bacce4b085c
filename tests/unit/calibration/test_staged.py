"""Many inputs through a model, block after block: the results of calling it, to the last bit, at a few reads of it."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import FAMILIES, REPEATED, TINY_MODELS
from torch import nn

from pared.calibration.spool import ActivationMemory
from pared.calibration.staged import run_staged
from pared.checkpoint.open_streamed import open_streamed
from pared.checkpoint.streamed import StreamedBlocks
from pared.models.source import find_model


def _store(family: str, folder: Path) -> StreamedBlocks:
    (TINY_MODELS | REPEATED)[family]().save_pretrained(folder)
    return open_streamed(find_model(str(folder)))


def _inputs(*lengths: int) -> list[dict[str, torch.Tensor]]:
    return [{"input_ids": (torch.arange(length) * 7 + length).remainder(64).unsqueeze(0)} for length in lengths]


def _counted(store: StreamedBlocks, monkeypatch: pytest.MonkeyPatch) -> Counter[int]:
    reads: Counter[int] = Counter()
    fill = store._places._names.fill

    def counting(tensors: Any, placed: Any) -> None:
        reads[len(reads) and int(tensors[0].key.split("layers.")[1].split(".")[0])] += 1
        fill(tensors, placed)

    monkeypatch.setattr(store._places._names, "fill", counting)
    return reads


@pytest.mark.parametrize("limit", [None, 0])
@pytest.mark.parametrize("family", [*FAMILIES, *REPEATED])
def test_results_are_those_of_calling_the_model(family: str, limit: int | None, tmp_path: Path) -> None:
    store, inputs = _store(family, tmp_path / "model"), _inputs(6, 6, 9, 4)
    whole = find_model(str(tmp_path / "model")).load()
    with ActivationMemory(limit, tmp_path / "out") as memory:
        found = [output[0] for output in run_staged(store, inputs, memory)]
        with torch.no_grad():
            expected = [whole(**given)[0] for given in inputs]
        assert all(map(torch.equal, found, expected))
        assert len(found) == 4
        assert bool(memory.spilled) == (limit == 0)
    assert all(parameter.is_meta for parameter in store.model.get_submodule(store.path).parameters())


def test_every_block_is_read_twice_for_any_number_of_inputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = _store("llama", tmp_path)
    reads = _counted(store, monkeypatch)
    assert len(list(run_staged(store, _inputs(*[5] * 7)))) == 7
    assert reads == {0: 2, 1: 2, 2: 2}


def test_blocks_that_keep_something_are_called_input_by_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = _store("llama", tmp_path)
    block = store.blocks[1]

    def forward(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
        self.seen = getattr(self, "seen", 0) + 1
        return original(x) * self.seen

    original = block.mlp.forward
    monkeypatch.setattr(block.mlp, "forward", forward.__get__(block.mlp))
    reads = _counted(store, monkeypatch)
    assert len(list(run_staged(store, _inputs(5, 5, 5)))) == 3
    assert reads[0] > 2


def test_blocks_that_are_no_chain_are_called_input_by_input(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = _store("llama", tmp_path)
    whole = find_model(str(tmp_path)).load()
    for model in (store.model, whole):  # the last block reads what the first put out, by another way
        first, last = model.model.layers[0], model.model.layers[2]
        kept: list[torch.Tensor] = []
        first.register_forward_hook(lambda _, __, output, kept=kept: kept.append(output))
        last.register_forward_pre_hook(lambda _, args, kept=kept: (args[0] + kept[-1], *args[1:]))
    inputs = _inputs(5, 7)
    with torch.no_grad():
        expected = [whole(**given)[0] for given in inputs]
    found = [output[0] for output in run_staged(store, inputs)]
    assert all(map(torch.equal, found, expected))
    assert "the blocks are no chain" in caplog.text


@pytest.mark.parametrize(
    "error", [OSError("gone"), MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")]
)
def test_what_the_machine_lacks_is_no_reason_to_read_every_block_for_every_input(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = _store("llama", tmp_path)

    def fails(*_: object) -> None:
        raise error

    monkeypatch.setattr("pared.calibration.staged.BlockCall.run", fails)
    with pytest.raises(type(error)):
        list(run_staged(store, _inputs(5, 5)))


def test_what_a_model_cannot_compute_is_raised(tmp_path: Path) -> None:
    store = _store("llama", tmp_path)
    with pytest.raises(IndexError):
        list(run_staged(store, [{"input_ids": torch.tensor([[999]])}]))
    assert all(parameter.is_meta for parameter in store.model.get_submodule(store.path).parameters())
