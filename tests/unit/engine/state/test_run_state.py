"""A compression that is killed at any moment finds what it had recorded, and nothing else."""

import os
import random
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import forked
from safetensors.torch import load_file

from pared import ParedError
from pared.engine.state import run_state
from pared.engine.state.run_state import CompressionRun
from pared.io.run_dir import RunDirectory, run_folder

BLOCKS = 3
FINGERPRINT = {"keep": 0.8}
OPERATIONS = ("write", "fsync", "replace", "unlink", "rename", "mkdir", "rmdir")  # of os


@contextmanager
def opened(out: Path, **more: Any) -> Iterator[CompressionRun]:
    with RunDirectory.open(out, "compress", FINGERPRINT | more) as directory:
        yield CompressionRun(directory)


def made(pass_name: str, index: int) -> dict[str, torch.Tensor]:
    """What a pass makes of a block: the same each time."""
    random = torch.Generator().manual_seed(1000 * int(pass_name[-1]) + index)
    return {f"block.{index}.up": torch.randn(4, 3, generator=random), "down": torch.ones(2, dtype=torch.bfloat16)}


def steps(run: CompressionRun) -> Iterator[Callable[[], None]]:
    """A whole compression: decompositions, a plan, blocks, and blocks once more in place of those."""
    for pass_name, replaces in (("pass-1", None), ("pass-2", None), ("pass-3", "pass-2")):
        for index in range(BLOCKS):
            if index not in run.finished(pass_name):
                yield lambda: step(run, pass_name, index, replaces)  # noqa: B023 - called at once
        if pass_name == "pass-1" and run.get("plan") is None:
            yield lambda: run.put("plan", {"q": {"rank": 3}, "keep": 1 / 3})


def step(run: CompressionRun, pass_name: str, index: int, replaces: str | None) -> None:
    files = [run.write(f"{pass_name}-block-{index:05}.safetensors", made(pass_name, index))]
    old = [] if replaces is None else run.files(replaces, index)
    run.record(pass_name, index, {"index": index, "costs": [index / 7, float("inf")]}, files, old)


def tensors(run: CompressionRun, pass_name: str, index: int) -> dict[str, torch.Tensor]:
    return {name: tensor for file in run.files(pass_name, index) for name, tensor in load_file(file).items()}


def state(run: CompressionRun) -> list[Any]:
    """Everything that a run holds."""
    there = {path.name for path in run.folder.glob("*.safetensors*")}
    found: list[Any] = [run.get("plan"), sorted(there & run._files.keys())]
    for pass_name in ("pass-1", "pass-2", "pass-3"):
        for index in sorted(run.finished(pass_name)):
            read = {name: tensor.tolist() for name, tensor in tensors(run, pass_name, index).items()}
            found.append((pass_name, index, run.fields(pass_name, index), read))
    return found


@pytest.fixture(scope="module")
def states(tmp_path_factory: pytest.TempPathFactory) -> list[list[Any]]:
    """What a run holds after every one of its steps."""
    with opened(tmp_path_factory.mktemp("run") / "out") as run:
        found = [state(run)]
        for step in steps(run):
            step()
            found.append(state(run))
    return found


def test_what_is_recorded_is_found(tmp_path: Path, states: list[list[Any]]) -> None:
    for number in range(1, len(states)):
        with opened(tmp_path / "out") as run:
            assert state(run) == states[number - 1]
            next(steps(run))()
        with opened(tmp_path / "out") as run:
            assert state(run) == states[number]
    assert states[-1][1] == [f"pass-{n}-block-0000{i}.safetensors" for n in (1, 3) for i in range(BLOCKS)]
    with opened(tmp_path / "out") as run:
        found = tensors(run, "pass-3", 2)
        assert all(torch.equal(tensor, found[name]) for name, tensor in made("pass-3", 2).items())
        assert run.files("pass-2", 1) == []  # dropped
        assert run.fields("pass-2", 1)["index"] == 1


class Killer:
    """Counts what is done to the disk, and kills this process before, in the midst of or after one operation."""

    def __init__(self, at: int | None) -> None:
        self.at, self.count = at, 0

    def passes(self) -> bool:
        self.count += 1
        return self.count == self.at

    def kill(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def around(self, act: Callable[..., Any], cut: Callable[..., object]) -> Callable[..., Any]:
        def acted(*arguments: Any, **more: Any) -> Any:
            if self.passes():
                self.kill()
            if self.passes():
                cut(*arguments)
                self.kill()
            result = act(*arguments, **more)
            if self.passes():
                self.kill()
            return result

        return acted

    def watch(self, patched: pytest.MonkeyPatch) -> None:
        write, save = os.write, run_state.save_file

        def half(tensors: dict[str, torch.Tensor], path: Path, _: object) -> None:
            save(tensors, path)
            os.truncate(path, path.stat().st_size // 2)

        for name in OPERATIONS:
            cut = (lambda number, data: write(number, data[: len(data) // 2])) if name == "write" else lambda *_: None
            patched.setattr(os, name, self.around(getattr(os, name), cut))
        patched.setattr(run_state, "save_file", self.around(save, half))


def killed_at(point: int, out: Path) -> bool:
    """Run a compression in a process of its own that is killed at a point; whether it was still at work."""

    def work() -> None:
        Killer(point).watch(pytest.MonkeyPatch())
        with opened(out) as run:
            for step in steps(run):
                step()

    return forked(work) == -signal.SIGKILL


def kills(out: Path, states: list[list[Any]], every: int) -> int:
    """Kill a run at every so-manieth point, look at what it left, and let it go on to its end; return the kills."""
    point = 0
    while True:
        point += every
        place = out / str(point)
        place.mkdir()
        if not killed_at(point, place / "out"):
            return point // every - 1
        with opened(place / "out") as run:
            assert state(run) in states
            assert {path.name for path in run.folder.glob("*.safetensors*")} == run._files.keys()
            for step in steps(run):
                step()
            assert state(run) == states[-1]
        assert [path.name for path in place.iterdir()] == [".out.compress"]


def test_a_kill_at_any_moment_leaves_what_was_recorded(tmp_path: Path, states: list[list[Any]]) -> None:
    assert kills(tmp_path, states, 13) > 12


@pytest.mark.slow
def test_a_kill_at_every_moment_leaves_what_was_recorded(tmp_path: Path, states: list[list[Any]]) -> None:
    assert kills(tmp_path, states, 1) > 150


def test_many_kills_of_one_run_lead_to_the_same_end(tmp_path: Path, states: list[list[Any]]) -> None:
    chance, deaths = random.Random(0), 0
    while killed_at(chance.randint(20, 60), tmp_path / "out"):
        deaths += 1
    assert deaths > 4
    with opened(tmp_path / "out") as run:
        assert state(run) == states[-1]


@pytest.mark.parametrize("name", ["write", "fsync", "replace", "save_file"])
def test_a_step_that_fails_changes_nothing_and_can_be_done_again(
    name: str, tmp_path: Path, states: list[list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with opened(tmp_path / "out") as run:
        for number, step in enumerate(steps(run)):
            if not (number == BLOCKS and name in ("replace", "save_file")):  # the plan has no file
                with monkeypatch.context() as patched:
                    patched.setattr(run_state if name == "save_file" else os, name, full)
                    with pytest.raises(ParedError, match="disk"):
                        step()
            assert state(run) == states[number]
            step()
        assert state(run) == states[-1]


# Damage.


def finished_run(out: Path) -> Path:
    with opened(out) as run:
        for step in steps(run):
            step()
    return run_folder(out, "compress")


def test_a_file_that_vanished_or_was_cut_is_told_and_nothing_is_lost(tmp_path: Path) -> None:
    folder = finished_run(tmp_path / "out")
    file = folder / "pass-1-block-00001.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:-1])
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    told = (
        rf"pass-1-block-00001\.safetensors has {len(content) - 1} bytes, expected {len(content)}; restore it, or remove"
    )
    with pytest.raises(ParedError, match=told), opened(tmp_path / "out"):
        pass
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    file.unlink()
    with pytest.raises(ParedError, match=r"pass-1-block-00001\.safetensors is missing"), opened(tmp_path / "out"):
        pass
    file.write_bytes(content)
    with opened(tmp_path / "out") as run:
        assert run.finished("pass-3") == {0, 1, 2}


def test_a_flipped_bit_in_a_file_is_told(tmp_path: Path) -> None:
    file = finished_run(tmp_path / "out") / "pass-3-block-00001.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(bytes(content))
    with opened(tmp_path / "out") as run:
        assert run.files("pass-3", 0)
        with pytest.raises(ParedError, match=r"pass-3-block-00001\.safetensors is damaged: its SHA-256"):
            run.files("pass-3", 1)


def test_a_line_of_something_else_is_told(tmp_path: Path) -> None:
    with RunDirectory.open(tmp_path / "out", "compress", FINGERPRINT) as directory:
        directory.journal.append({"stage": 1})
        with pytest.raises(ParedError, match=r"journal\.jsonl, line 2: not a line of a compression"):
            CompressionRun(directory)


def test_tensors_that_share_memory_are_written_apart(tmp_path: Path) -> None:
    whole = torch.arange(6.0).reshape(2, 3)
    with opened(tmp_path / "out") as run:
        tensors = {"whole": whole, "row": whole[0], "turned": whole.T, "again": whole}
        found = load_file(run.write("pass-1.safetensors", tensors))
    assert all(
        torch.equal(found[name], one) for name, one in (("row", whole[0]), ("turned", whole.T), ("again", whole))
    )


def test_a_run_that_nobody_takes_up_works_alike(tmp_path: Path, states: list[list[Any]]) -> None:
    with RunDirectory.temporary(tmp_path / "out") as directory:
        run = CompressionRun(directory)
        for step in steps(run):
            step()
        assert state(run) == states[-1]
    assert list(tmp_path.iterdir()) == []
