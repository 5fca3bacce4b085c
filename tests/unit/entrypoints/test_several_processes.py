"""``pared compress`` in several processes: one folder, one table, one error, and a run that another number resumes."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from processes import launch
from safetensors.torch import load_file

import pared
from pared import processes
from pared.calibration import BlockStatistics
from pared.engine.solve import Solver
from pared.schema.manifest import Manifest


def words_of(place: Path, out: Path, *more: str) -> list[str]:
    text = ["--data", f"file:{place}/words.txt", "--samples", "8", "--length", "16", "--calibration-dtype", "float32"]
    asked = ["--method", "loss-optimal", "--keep", "0.7", "--statistics", "once", "--eval-length", "16"]
    return ["compress", str(place / "llama"), *asked, "--eval-windows", "2", *text, "--out", str(out), *more]


def die_at_the_second_block(rank: int) -> None:
    real = Solver.visit

    def visit(self: Solver, block: BlockStatistics) -> None:
        if rank == 1 and block.index == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        real(self, block)

    Solver.visit = visit  # type: ignore[method-assign]


def fail_at_the_second_block(rank: int) -> None:
    real = Solver.visit

    def visit(self: Solver, block: BlockStatistics) -> None:
        if rank == 1 and block.index == 1:
            raise pared.ParedError("site broken: nothing can be made of it")
        real(self, block)

    Solver.visit = visit  # type: ignore[method-assign]


def test_a_process_that_dies_ends_all_and_another_number_resumes(place: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    ended = launch(2, words_of(place, out), tmp_path, die_at_the_second_block)
    assert [code for code, _ in ended] == [2, -9], ended[0][1]
    assert "another process of this job has ended" in ended[0][1].replace("\n", " ")
    assert not out.exists()
    resumed = launch(3, words_of(place, out, "--resume"), tmp_path)
    assert [code for code, _ in resumed] == [0, 0, 0]
    assert "resuming the compression" in resumed[0][1]
    assert [told for _, told in resumed[1:]] == ["", ""], "the first process alone tells"
    alone = launch(1, words_of(place, tmp_path / "alone"), tmp_path)
    assert alone[0][0] == 0
    one, several = (Manifest.read(folder) for folder in (tmp_path / "alone", out))
    assert several.plan == one.plan
    assert several.perplexity_before == one.perplexity_before
    assert several.perplexity_after == pytest.approx(one.perplexity_after, rel=1e-4)
    weights = [load_file(folder / "model.safetensors") for folder in (tmp_path / "alone", out)]
    assert weights[0].keys() == weights[1].keys()
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".out.compress")] == []


def test_the_error_of_one_process_is_told_once_and_ends_all(place: Path, tmp_path: Path) -> None:
    ended = launch(2, words_of(place, tmp_path / "out"), tmp_path, fail_at_the_second_block)
    assert [code for code, _ in ended] == [2, 2]
    assert sum(told.count("error:") for _, told in ended) == 1
    assert "site broken: nothing can be made of it" in ended[1][1]
    assert not (tmp_path / "out").exists()


def be_late_with_an_error(rank: int) -> None:
    real = processes.speaks

    def speaks() -> bool:
        time.sleep(2)
        return real()

    if rank == 1:
        processes.speaks = speaks  # type: ignore[assignment]


def test_an_error_of_all_processes_is_told_once(place: Path, tmp_path: Path) -> None:
    """Regression: on a busy machine the process that holds the store was gone before the other asked it."""
    ended = launch(2, words_of(place, tmp_path / "out", "--length", "4000"), tmp_path, be_late_with_an_error)
    assert [code for code, _ in ended] == [2, 2]
    assert sum(told.count("error:") for _, told in ended) == 1


@pytest.mark.slow
def test_by_torchrun_an_error_of_all_three_processes_is_told_once(place: Path, tmp_path: Path) -> None:
    """Regression: its agent interrupted the first process, which waited for the others, so that nothing was told."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "3"]
    words = words_of(place, tmp_path / "out", "--length", "4000")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(
        [*torchrun, "-m", "pared.cli.main", *words], capture_output=True, text=True, env=environment, check=False
    )
    told = ended.stdout + ended.stderr
    assert ended.returncode != 0
    assert len(re.findall(r"^error: .*4000", told, flags=re.M)) == 1, told[-3000:]
    assert not re.search(r'File ".*/pared/', told), "the only traceback is torchrun's own"
    assert not (tmp_path / "out").exists()
