"""What outlives a process: found again by the very same run, refused to any other, gone when the output is there."""

import errno
import json
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from pared import ParedError
from pared.io.fingerprint import differences
from pared.io.leftovers import tidy
from pared.io.run_dir import RunDirectory, entries_of, run_folder
from pared.names import told_in_flags

FINGERPRINT = {"keep": 0.8, "calibration": {"samples": 64, "seed": 0}, "model": "0123456789abcdef" * 4, "skip": ()}


def begun(out: Path, **more: Any) -> Path:
    """A run that was killed after it had committed a file and a line."""
    with RunDirectory.open(out, "compress", FINGERPRINT | more) as run:
        commit(run, lambda path: path.write_text("content"))
        run.journal.append({"block": 0})
    return run_folder(out, "compress")


def commit(run: RunDirectory, write: Callable[[Path], object], name: str = "file", needed: int = 0) -> None:
    with run.commit_file(name, needed) as path:
        write(path)


def interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def held(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# Found again, or not.


def test_the_same_run_finds_what_was_committed(tmp_path: Path) -> None:
    begun(tmp_path / "out")
    tidy(tmp_path / "out")  # what killed processes left goes; this is not that
    with RunDirectory.open(tmp_path / "out", "compress", json.loads(json.dumps(FINGERPRINT))) as run:
        assert run.resumed
        assert run.journal.entries == [{"block": 0}] == entries_of(run.folder, "compress")
        assert (run.folder / "file").read_text() == "content"


def test_another_run_is_refused_with_every_difference_and_nothing_is_lost(tmp_path: Path) -> None:
    before = held(begun(tmp_path / "out", device="cpu"))
    other = {**FINGERPRINT, "keep": 0.6, "calibration": {"samples": 128, "seed": 0}, "model": "f" * 64, "dtype": "auto"}
    with pytest.raises(ParedError) as told, RunDirectory.open(tmp_path / "out", "compress", other):
        pass
    assert (
        "(keep: 0.8 there, 0.6 now, calibration.samples: 64 there, 128 now, model: '0123456789ab…' there, "
        "'ffffffffffff…' now, dtype: nothing there, 'auto' now, device: 'cpu' there, nothing now)"
    ) in str(told.value)
    assert str(run_folder(tmp_path / "out", "compress")) in str(told.value)
    assert held(run_folder(tmp_path / "out", "compress")) == before


def test_a_run_that_does_not_resume_begins_anew_and_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = begun(tmp_path / "out")
    with RunDirectory.open(tmp_path / "out", "compress", {"keep": 0.5}, resume=False) as run:
        assert not run.resumed
        assert run.journal.entries == []
        assert [path.name for path in tmp_path.iterdir()] == [folder.name]
        assert sorted(held(folder)) == ["journal.jsonl", "settings.json"]
    assert "this one starts over" in caplog.text
    assert list(tmp_path.iterdir()) == []


def test_unfinished_work_is_neither_taken_up_nor_removed_unasked(tmp_path: Path) -> None:
    folder = begun(tmp_path / "out")
    before = held(folder)
    expected = {
        "of these very settings: resume=True continues it, resume=False removes it and starts over": FINGERPRINT,
        r"with other settings \(keep: 0.8 there, 0.5 now.*start over \(resume=False\)": FINGERPRINT | {"keep": 0.5},
    }
    for message, fingerprint in expected.items():
        with (
            pytest.raises(ParedError, match=message),
            RunDirectory.open(tmp_path / "out", "compress", fingerprint, resume=None),
        ):
            pass
        assert held(folder) == before
    with told_in_flags(), pytest.raises(ParedError, match="--resume continues it, --restart removes it"):
        RunDirectory.open(tmp_path / "out", "compress", FINGERPRINT, resume=None).__enter__()


def test_what_holds_nothing_to_be_resumed_is_in_nobodys_way(tmp_path: Path) -> None:
    with RunDirectory.open(tmp_path / "out", "compress", FINGERPRINT) as run:
        left = tmp_path / "left"
        shutil.copytree(run.folder, left)  # as a kill before the first line leaves it
    left.rename(run.folder)
    with RunDirectory.open(tmp_path / "out", "compress", {"keep": 0.5}, resume=None) as run:
        assert not run.resumed
    (run_folder(tmp_path / "out", "compress")).mkdir()
    (run_folder(tmp_path / "out", "compress") / "mine.txt").touch()
    with (
        pytest.raises(ParedError, match=r"holds mine\.txt and no settings\.json"),
        RunDirectory.open(tmp_path / "out", "compress", FINGERPRINT, resume=None),
    ):
        pass
    assert (run_folder(tmp_path / "out", "compress") / "mine.txt").exists()


def test_a_run_that_is_done_or_did_nothing_leaves_nothing(tmp_path: Path) -> None:
    with RunDirectory.open(tmp_path / "out", "compress", FINGERPRINT):
        pass
    begun(tmp_path / "out")
    with RunDirectory.open(tmp_path / "out", "compress", FINGERPRINT) as run:
        run.finish()
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_fails_keeps_what_it_has_done(tmp_path: Path) -> None:
    with suppress(KeyboardInterrupt), RunDirectory.open(tmp_path / "out", "compress", FINGERPRINT) as run:
        run.journal.append({"block": 0})
        interrupt()
    with RunDirectory.open(tmp_path / "out", "compress", FINGERPRINT) as run:
        assert run.journal.entries == [{"block": 0}]


def test_two_runs_of_one_output_at_a_time_are_refused(tmp_path: Path) -> None:
    for resume in (True, False):
        with (
            RunDirectory.open(tmp_path / "out", "compress", FINGERPRINT) as run,
            pytest.raises(ParedError, match="another process is at work on this output; wait for it"),
            RunDirectory.open(tmp_path / "out", "compress", FINGERPRINT, resume=resume),
        ):
            pass
        assert not run.folder.exists()
    with (  # of other kinds or outputs there may be others
        RunDirectory.open(tmp_path / "out", "compress", FINGERPRINT),
        RunDirectory.open(tmp_path / "out", "training", FINGERPRINT),
        RunDirectory.open(tmp_path / "out2", "compress", FINGERPRINT),
    ):
        pass


def test_a_temporary_run_is_gone_at_its_end(tmp_path: Path) -> None:
    with RunDirectory.temporary(tmp_path / "out") as run:
        run.journal.append({"block": 0})
        commit(run, lambda path: path.write_text("content"))
        assert run.folder.parent == tmp_path
    assert list(tmp_path.iterdir()) == []


# Damage.


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff", b'{"a": 1, "a": 2}'])
def test_damaged_settings_are_told(tmp_path: Path, content: bytes) -> None:
    folder = begun(tmp_path / "out")
    (folder / "settings.json").write_bytes(content)
    before = held(folder)
    with (
        pytest.raises(ParedError, match=r"settings\.json.*restore that file, or start over \(resume=False\)"),
        RunDirectory.open(tmp_path / "out", "compress", FINGERPRINT),
    ):
        pass
    assert held(folder) == before


def test_a_damaged_journal_is_told_by_line_and_stays(tmp_path: Path) -> None:
    folder = begun(tmp_path / "out")
    journal = folder / "journal.jsonl"
    journal.write_bytes(journal.read_bytes().replace(b'"block": 0', b'"block": 1'))
    before = held(folder)
    with (
        pytest.raises(ParedError, match=r"journal\.jsonl, line 2: not a line of a compress run"),
        RunDirectory.open(tmp_path / "out", "compress", FINGERPRINT),
    ):
        pass
    assert held(folder) == before


@pytest.mark.parametrize("make", [lambda path: path.write_text("mine"), lambda path: path.mkdir()])
def test_a_folder_that_is_no_run_is_refused_and_stays(tmp_path: Path, make: Callable[[Path], None]) -> None:
    folder = run_folder(tmp_path / "out", "compress")
    folder.mkdir()
    make(folder / "mine")
    with (
        pytest.raises(ParedError, match=r"holds mine and no settings\.json"),
        RunDirectory.open(tmp_path / "out", "compress", FINGERPRINT),
    ):
        pass
    assert (folder / "mine").exists()


def test_a_file_where_the_folder_would_be_is_told(tmp_path: Path) -> None:
    run_folder(tmp_path / "out", "compress").write_text("mine")
    with pytest.raises(ParedError, match="File exists"), RunDirectory.open(tmp_path / "out", "compress", FINGERPRINT):
        pass


# Files.


def test_a_file_that_was_begun_is_none(tmp_path: Path) -> None:
    folder = begun(tmp_path / "out")
    with RunDirectory.open(tmp_path / "out", "compress", FINGERPRINT) as run:
        with pytest.raises(KeyboardInterrupt):
            commit(run, lambda path: interrupt(path.write_text("other")))
        assert (folder / "file").read_text() == "content"
    (folder / "more.partial").write_text("of a process that was killed")
    with RunDirectory.open(tmp_path / "out", "compress", FINGERPRINT):
        assert sorted(held(folder)) == ["file", "journal.jsonl", "settings.json"]


def test_a_full_disk_is_told_with_what_is_needed_and_free_and_nothing_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = begun(tmp_path / "out")
    before = held(folder)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with RunDirectory.open(tmp_path / "out", "compress", FINGERPRINT) as run:
        with monkeypatch.context() as patched:
            patched.setattr(os, "fsync", full)
            with pytest.raises(ParedError, match=r"not enough disk for .*more: 1,000 bytes needed, [\d,]+ free"):
                commit(run, lambda path: path.write_text("more"), "more", 1000)
        needed = 10 * shutil.disk_usage(tmp_path).free  # is not even begun
        with pytest.raises(ParedError, match=f"{needed:,} bytes needed"):
            commit(run, interrupt, "more", needed)
        assert held(folder) == before


def test_a_limit_on_the_size_of_files_is_told_too(tmp_path: Path) -> None:
    """Whoever writes, ours or safetensors, and whatever it calls the error."""
    resource = pytest.importorskip("resource")
    begun(tmp_path / "out")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    with RunDirectory.open(tmp_path / "out", "compress", FINGERPRINT) as run:
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, before[1]))
        try:
            for write in (
                lambda path: path.write_bytes(bytes(100_000)),
                lambda path: save_file({"x": torch.zeros(25_000)}, path),
            ):
                with pytest.raises(ParedError, match=r"not enough disk for .*more: "):
                    commit(run, write, "more")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert sorted(held(run.folder)) == ["file", "journal.jsonl", "settings.json"]


def test_a_line_is_written_after_its_file_is_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []

    def told(name: str) -> None:
        act = getattr(os, name)

        def tell(*arguments: Any) -> Any:
            order.append(name)
            return act(*arguments)

        monkeypatch.setattr(os, name, tell)

    with RunDirectory.open(tmp_path / "out", "compress", FINGERPRINT) as run:
        run.journal.begin()
        for name in ("fsync", "replace", "write"):
            told(name)
        commit(run, Path.touch)
        run.journal.append({"block": 0})
    # The file, its name; the folder that holds the name; the line.
    assert order == ["fsync", "replace", "fsync", "write", "fsync"]


# How two runs differ.


@pytest.mark.parametrize(
    ("there", "now", "told"),
    [
        ({"a": 1}, {"a": 1}, []),
        ({"a": [1, 2]}, {"a": (1, 2)}, []),
        ({"a": {"b": {"c": 1}}}, {"a": {"b": {"c": 2}}}, ["a.b.c: 1 there, 2 now"]),
        ({"a": {}}, {"a": {"b": 1}}, ["a.b: nothing there, 1 now", "a: {} there, nothing now"]),
        ({"a": None}, {}, ["a: None there, nothing now"]),
        ({"a": "x" * 500}, {"a": ""}, ["a: '" + "x" * 99 + "... there, '' now"]),
        ({"a": ["0" * 64]}, {"a": ["1" * 64]}, ["a: ['000000000000…'] there, ['111111111111…'] now"]),
    ],
)
def test_differences_are_told_key_by_key(there: dict[str, Any], now: dict[str, Any], told: list[str]) -> None:
    assert differences(there, now) == told
