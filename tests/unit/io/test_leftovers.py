"""Kills: whatever moment a process ends at, there is a whole output, and the next run leaves nothing behind."""

import os
import random
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import forked
from tiny_models import TINY_MODELS
from transformers import PreTrainedTokenizerFast

import pared
import pared.io.output_dir as staging_module
from pared import Calibration, ParedError, Recipe
from pared.engine.state.solutions import DecompositionStore
from pared.io.leftovers import REPLACED, SCRATCH, STAGING, held, scratch, this_machine
from pared.io.lock import locked_folder
from pared.io.output_dir import require_free, staged
from pared.io.record import write_sums
from pared.io.swap import exchange
from pared.lowrank.svd import decompose

DEAD = 2**22 + 1  # above the largest process id of Linux
CHANGES = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "ctypes.dlsym", "shutil.rmtree")  # audit events
TOUCHES = ("os.", "shutil.", "open", "ctypes.", "tempfile.", "fcntl.")  # of whatever looks at a disk


def killed_at(point: int | None, work: Callable[[], object], events: tuple[str, ...] = CHANGES) -> bool:
    """Do something in a process of its own that is killed at a point; whether it was still at work."""

    def counted() -> None:
        passed = 0

        def count(event: str, _: object) -> None:
            nonlocal passed
            if event.startswith(events):
                passed += 1
                if passed == point:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(count)
        work()

    return forked(counted) == -signal.SIGKILL


def make(out: Path, content: str) -> None:
    with staged(out, overwrite=True) as staging:
        for name in ("config.json", "weights"):
            (staging / name).write_text(content)
        write_sums(staging)


def found_in(out: Path) -> set[str]:
    return {(out / name).read_text() for name in ("config.json", "weights")}


def hidden(place: Path) -> list[str]:
    return sorted(path.name for path in place.rglob(".*"))


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
@pytest.mark.parametrize("events", [CHANGES, pytest.param(TOUCHES, marks=pytest.mark.slow)], ids=["few", "all"])
@pytest.mark.parametrize("exchanges", [True, False])
@pytest.mark.parametrize("there", [True, False])
def test_a_kill_at_any_point_leaves_a_whole_output_and_the_next_run_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exchanges: bool, there: bool, events: tuple[str, ...]
) -> None:
    """Regression: a kill between two renames left no output, one during removal a hidden copy for good."""
    if not exchanges:
        monkeypatch.setattr(staging_module, "exchange", lambda *_: False)
    missing, point = 0, 1
    while True:
        place = tmp_path / str(point)
        place.mkdir()
        out = place / "out"
        if there:
            make(out, "old")
        if not killed_at(point, lambda out=out: make(out, "new"), events):
            break
        if out.exists():
            assert found_in(out) in ({"old"}, {"new"})
        elif there:
            missing += 1
            with pytest.raises(ParedError, match="is there already"):
                require_free(out, overwrite=False)  # any next run puts it back first
            assert found_in(out) == {"old"}
        make(out, "next")
        assert found_in(out) == {"next"}
        assert hidden(place) == [], point
        point += 1
    assert point > (5 if there else 2)
    assert bool(missing) == (there and not exchanges)


def test_folders_change_places(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / name).write_text(name)
    if not exchange(tmp_path / "a", tmp_path / "b"):
        pytest.skip("this system or file system cannot exchange folders")
    assert (tmp_path / "a" / "b").read_text() == "b"
    assert (tmp_path / "b" / "a").read_text() == "a"
    with pytest.raises(FileNotFoundError):
        exchange(tmp_path / "a", tmp_path / "nowhere")


def test_what_a_live_process_works_in_is_not_swept(tmp_path: Path) -> None:
    with held(tmp_path / "out", STAGING) as busy:
        make(tmp_path / "out", "new")
        assert busy.is_dir()


def test_a_process_id_that_another_program_has_now_does_not_keep_what_was_left(tmp_path: Path) -> None:
    left = tmp_path / f".out.staging-{this_machine()}-{os.getppid()}-abc"
    left.mkdir()
    (left / "half").write_text("half")
    os.utime(left, (time.time() - 3600,) * 2)
    make(tmp_path / "out", "new")
    assert hidden(tmp_path) == []


def test_what_was_swept_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / f".out.staging-{this_machine()}-{DEAD}-abc").mkdir()
    make(tmp_path / "out", "new")
    assert f"removed {tmp_path}/.out.staging-{this_machine()}-{DEAD}-abc" in caplog.text


@pytest.mark.parametrize("kind", [STAGING, REPLACED, SCRATCH])
def test_what_another_machine_made_is_left_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture, kind: str) -> None:
    """Regression: on a shared file system the run of another host was taken for dead, and its files went."""
    other = tmp_path / f".out.{kind}-{'0' * 8}-{DEAD}-abc"
    other.mkdir()
    (other / "half").write_text("half")
    os.utime(other, (time.time() - 3600,) * 2)
    with scratch(tmp_path / "out"):
        require_free(tmp_path / "out", overwrite=True)
    assert ("if it was killed, move that back" in caplog.text) == (kind == REPLACED)
    make(tmp_path / "out", "new")
    assert (other / "half").read_text() == "half"


def test_who_looks_whether_a_folder_is_held_does_not_stop_who_makes_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Regression: BlockingIOError where another process looked at a folder that was just made."""
    made, looking = threading.Event(), threading.Event()
    mkdtemp = tempfile.mkdtemp

    def seen(**how: Any) -> str:
        folder = mkdtemp(**how)
        looker.append(Path(folder))
        made.set()
        assert looking.wait(10)
        return folder

    def look() -> None:
        assert made.wait(10)
        with locked_folder(looker[0]):
            looking.set()
            time.sleep(0.05)

    looker: list[Path] = []
    monkeypatch.setattr("pared.io.leftovers.tempfile.mkdtemp", seen)
    thread = threading.Thread(target=look)
    thread.start()
    with held(tmp_path / "out", STAGING) as folder:
        assert folder.is_dir()
    thread.join()


# Temporary decompositions.


def test_decompositions_lie_beside_the_output_and_are_swept_after_a_kill(tmp_path: Path) -> None:
    """Regression: a killed library call left gigabytes in the folder of temporary files."""
    W_ON = torch.randn(6, 4, dtype=torch.float64)

    def killed() -> None:
        with DecompositionStore(tmp_path / "deep" / "out") as store:
            store.put("a", decompose(W_ON))
            os.kill(os.getpid(), signal.SIGKILL)

    assert killed_at(None, killed)
    (left,) = hidden(tmp_path)[:1]
    assert left.startswith(f".out.{SCRATCH}-")
    with DecompositionStore(tmp_path / "deep" / "out") as store:
        assert left not in hidden(tmp_path)
        store.put("a", decompose(W_ON))
        assert len(hidden(tmp_path)) == 1
    assert hidden(tmp_path) == []


def test_without_an_output_they_lie_in_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PARED_CACHE", str(tmp_path / "cache"))
    with scratch(None) as folder:
        assert folder.parent == tmp_path / "cache" / SCRATCH
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("PARED_CACHE", str(tmp_path / "file" / "cache"))
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path / "temporary"))
    with scratch(None) as folder:
        assert folder.parent.parent == tmp_path / "temporary"
        assert folder.parent.stat().st_mode & 0o077 == 0


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
def test_whole_jobs_killed_at_random_leave_the_old_folder_or_the_new(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    TINY_MODELS["llama"]().save_pretrained(tmp_path / "dense")
    tokenizer.save_pretrained(tmp_path / "dense")
    (tmp_path / "words.txt").write_text(" ".join(f"w{number % 61 + 3}" for number in range(2000)))
    (tmp_path / "jobs").mkdir()
    calibration = Calibration(text=f"file:{tmp_path}/words.txt", samples=4, length=16, dtype="float32")
    recipe = Recipe(model=str(tmp_path / "dense"), method="svd-llm", keep=0.6, out=str(tmp_path / "jobs" / "out"),
                    calibration=calibration, evaluation=None)  # fmt: skip
    pared.run(recipe)
    draws, killed = random.Random(0), 0
    for number in range(40):
        asked = recipe.model_copy(update={"keep": (0.6, 0.8)[number % 2]})
        starting_over = partial(pared.run, asked, overwrite=True, resume=False)
        killed += killed_at(draws.randrange(1, 200), starting_over, TOUCHES)
        assert pared.verify(tmp_path / "jobs" / "out") == 0.0
    assert killed > 15
    pared.run(recipe, overwrite=True, resume=False)
    assert hidden(tmp_path / "jobs") == []
