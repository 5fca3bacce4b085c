"""Hidden states that do not fit in memory lie on the disk, and nobody sees a difference."""

import gc
import os
import shutil
from pathlib import Path

import pytest
import torch

from pared.calibration.spool import ActivationMemory, HiddenStates
from pared.errors import ParedError

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def _batches(dtype: torch.dtype = torch.float32, count: int = 3) -> list[torch.Tensor]:
    return [torch.randn(2, 5, 8).to(dtype) for _ in range(count)]


@pytest.mark.parametrize("limit", [None, 0, 400])
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_read_has_the_bits_that_were_written(tmp_path: Path, dtype: torch.dtype, limit: int | None) -> None:
    tensors = _batches(dtype)
    tensors[0][0, 0, :4] = torch.tensor([float("nan"), float("inf"), -0.0, 1e-30]).to(dtype)
    with ActivationMemory(limit, tmp_path / "out") as memory:
        hidden = HiddenStates(tensors, memory)
        assert len(hidden) == 3
        for found, expected in zip(hidden, tensors, strict=True):
            assert found.dtype == dtype
            assert torch.equal(found.view(torch.uint8), expected.view(torch.uint8))
        assert memory.used <= (10**9 if limit is None else limit)
    assert not list(tmp_path.iterdir())


def test_strides_are_kept_as_kernels_go_by_them(tmp_path: Path) -> None:
    whole = torch.randn(3, 4, 5)
    tensors = [whole, whole.permute(1, 0, 2), whole.permute(2, 0, 1), whole[:1].expand(3, 4, 5), whole[:, ::2]]
    with ActivationMemory(0, tmp_path / "out") as memory:
        hidden = HiddenStates(tensors, memory)
        for found, expected in zip(hidden, tensors, strict=True):
            assert torch.equal(found, expected)
        assert [found.stride() for found in hidden][:3] == [tensor.stride() for tensor in tensors[:3]]


def test_no_more_than_the_limit_is_held_in_memory(tmp_path: Path) -> None:
    tensors = _batches(count=5)
    size = tensors[0].nbytes
    with ActivationMemory(2 * size + 1, tmp_path / "out") as memory:
        hidden = HiddenStates(tensors, memory)
        assert memory.used == 2 * size
        assert memory.spilled == 3 * size
        for number in range(5):
            hidden[number] = hidden[number] + 1
        assert memory.used == 2 * size
        copy = hidden.clone()
        assert memory.used == 2 * size
        assert memory.spilled == 5 * size  # what is on the disk is not copied there
        copy.free()
        hidden.free()
        gc.collect()
        assert memory.used == 0
        assert not any(memory.folder.iterdir())


@pytest.mark.parametrize("limit", [None, 0])
def test_a_clone_does_not_change_with_the_original(tmp_path: Path, limit: int | None) -> None:
    tensors = _batches()
    with ActivationMemory(limit, tmp_path / "out") as memory:
        hidden = HiddenStates([tensor.clone() for tensor in tensors], memory)
        copy = hidden.clone()
        for number in range(3):
            hidden[number].add_(1)  # as a block that works in place
            hidden[number] = hidden[number] * 2
        assert all(map(torch.equal, copy, tensors))


def test_some_batches_are_a_list_of_their_own(tmp_path: Path) -> None:
    tensors = _batches()
    for limit in (None, 0):
        with ActivationMemory(limit, tmp_path / "out") as memory:
            hidden = HiddenStates(tensors, memory)
            first = hidden.part(0, 2)
            assert len(first) == 2
            first[0] = tensors[0] + 1
            assert torch.equal(hidden[0], tensors[0])
            first.append_from(hidden, 2)
            assert torch.equal(first[2], tensors[2])
            hidden.take(first.part(0, 2))
            assert len(hidden) == 2
            assert torch.equal(hidden[0], tensors[0] + 1)


def test_a_disk_that_fills_up_is_one_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Full:
        def __enter__(self) -> "Full":
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def write(self, _: object) -> int:
            raise OSError(28, os.strerror(28))

    with ActivationMemory(0, tmp_path / "out") as memory:
        folder = memory.folder
        monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9, 0))
        monkeypatch.setattr("builtins.open", lambda *_, **__: Full())
        with pytest.raises(ParedError, match=rf"not enough disk for activations in {folder.parent}"):
            HiddenStates(_batches(), memory)


def test_a_file_that_was_cut_is_told(tmp_path: Path) -> None:
    with ActivationMemory(0, tmp_path / "out") as memory:
        hidden = HiddenStates(_batches(), memory)
        for file in memory.folder.iterdir():
            os.truncate(file, 10)
        with pytest.raises(ParedError, match="end too early"):
            hidden[1]


def test_what_was_given_up_is_not_read(tmp_path: Path) -> None:
    hidden = HiddenStates(_batches())
    hidden.free()
    with pytest.raises(ParedError, match="given up"):
        hidden[0]
