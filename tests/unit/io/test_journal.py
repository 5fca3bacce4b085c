"""Journals: a torn last line is dropped, anything else that is damaged is told by file and line."""

import errno
import json
import math
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import pytest

from pared import ParedError
from pared.cli.console import write_json
from pared.entrypoints.evaluation.kept_results import Kept
from pared.io import lock as locking
from pared.io.files import descriptor_of, is_kept_on_disk, why_not_written, write_whole
from pared.io.journal import Journal, opened, read_entries, sealed
from pared.search.evolution import Measured
from pared.search.journal import SearchJournal

HEADER = {"journal": 1, "x": 0.5}
ROWS = [{"name": f"candidate {number}", "value": number / 7} for number in range(4)]


def written(path: Path) -> list[bytes]:
    with Journal(path, HEADER, of="a test") as journal:
        for row in ROWS:
            journal.append(row)
    return path.read_bytes().splitlines(keepends=True)


def read(path: Path) -> list[dict[str, Any]]:
    with Journal(path, HEADER, of="a test") as journal:
        return journal.entries


def test_lines_come_back_as_they_were_written(tmp_path: Path) -> None:
    lines = written(tmp_path / "journal")
    assert read(tmp_path / "journal") == ROWS
    assert all(json.loads(line)["check"] for line in lines)  # a line is JSON for whoever reads it


def test_a_journal_cut_at_any_byte_is_gone_on_with(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    lines = written(path)
    content = b"".join(lines)
    for length in range(0, len(content) + 1, 7):
        path.write_bytes(content[:length])
        whole = content[:length].count(b"\n")
        assert read(path) == ROWS[: max(whole - 1, 0)]
        assert not whole or path.read_bytes() == b"".join(lines[:whole])
        assert path.exists() == bool(whole)  # nothing is left of a file that holds nothing
    path.write_bytes(content[: len(content) // 2])
    with Journal(path, HEADER, of="a test") as journal:  # and what is written then is what would have been
        for row in ROWS[len(journal.entries) :]:
            journal.append(row)
    assert path.read_bytes() == content


def test_a_flipped_bit_anywhere_is_found(tmp_path: Path) -> None:
    """Regression: a digit that flipped was read as what had been measured."""
    path = tmp_path / "journal"
    lines = written(path)
    content = b"".join(lines)
    for place in range(0, len(content) - 1, 5):
        changed = bytearray(content)
        changed[place] ^= 1
        path.write_bytes(bytes(changed))
        number = content[:place].count(b"\n") + 1
        with pytest.raises(ParedError, match=rf"{path}, line ({number}|{min(number + 1, len(lines))}):"):
            read(path)  # a key that flips makes a line of before there were checksums, which the next one tells


@pytest.mark.parametrize("change", ["lost", "swapped", "doubled", "without checksum"])
def test_lines_that_are_lost_moved_or_replaced_are_found(tmp_path: Path, change: str) -> None:
    path = tmp_path / "journal"
    lines = written(path)
    bare = json.dumps(ROWS[1]).encode() + b"\n"
    changed = {
        "lost": [*lines[:2], *lines[3:]],
        "swapped": [*lines[:2], lines[3], lines[2], lines[4]],
        "doubled": [*lines[:3], lines[2], *lines[3:]],
        "without checksum": [*lines[:2], bare, *lines[3:]],
    }[change]
    path.write_bytes(b"".join(changed))
    with pytest.raises(ParedError, match=rf"{path}, line [34]: not a line of a test, or its checksum is wrong"):
        read(path)


def test_a_torn_line_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "journal"
    path.write_bytes(b"".join(written(path))[:-9])
    read(path)
    assert "line 5 is torn" in caplog.text


def test_a_journal_of_before_there_were_checksums_is_read_and_gone_on_with(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    path.write_text("".join(json.dumps(row) + "\n" for row in (HEADER, *ROWS[:2])))
    with Journal(path, HEADER, of="a test") as journal:
        assert journal.entries == ROWS[:2]
        journal.append(ROWS[2])
        journal.append(ROWS[3])
    assert read(path) == ROWS


@pytest.mark.parametrize("content", ["mine", "mine\n", '{"other": 1}\n', "\n", "\x00" * 50, '{"journals": 1}\n'])
def test_another_file_is_refused_and_stays(tmp_path: Path, content: str) -> None:
    """Regression: a file of one line without its end was emptied as a torn journal."""
    (tmp_path / "journal").write_text(content)
    with pytest.raises(ParedError, match="line 1: the first line is not that of a test"):
        read(tmp_path / "journal")
    assert (tmp_path / "journal").read_text() == content


def test_lines_of_a_cache_stand_alone() -> None:
    line, _ = sealed({"unit": "q", "rank": 3, "perplexity": 7.5})
    assert opened(line[:-1]) == ({"unit": "q", "rank": 3, "perplexity": 7.5}, json.loads(line)["check"])
    assert opened(line[:-1].replace(b"7.5", b"7.6")) is None


@pytest.mark.parametrize("strategy", ["evolution", "random"])
def test_the_journals_of_the_benchmarks_are_read(tmp_path: Path, strategy: str) -> None:
    source = Path(__file__).parents[3] / "benchmarks" / "search" / strategy
    for name in ("journal.jsonl", "seconds.jsonl"):
        (tmp_path / name).write_bytes((source / name).read_bytes())
    settings = json.loads((source / "journal.jsonl").read_text().partition("\n")[0])
    del settings["pared_search"]
    with SearchJournal(tmp_path / "journal.jsonl", settings) as journal:
        assert journal.resumed == (source / "journal.jsonl").read_bytes().count(b"\n") - 1 > 300
        assert math.isfinite(journal.get("dense", "dense").values[0])
        journal.put("new", "program", Measured((1.5,)))
    for name in ("journal.jsonl", "seconds.jsonl"):
        assert (tmp_path / name).read_bytes().startswith((source / name).read_bytes())


def test_kept_results_with_a_flipped_digit_are_refused(tmp_path: Path) -> None:
    with Kept(tmp_path / "found.json") as kept:
        kept.begin({"model": "m"})
        kept.add("rte", {"task": "rte", "accuracy": 0.525})
        kept.add("piqa", {"task": "piqa", "accuracy": 0.5})
    path = tmp_path / ".found.json.unfinished"
    path.write_bytes(path.read_bytes().replace(b"0.525", b"0.625"))
    with (
        pytest.raises(ParedError, match=r"results .*\.found\.json\.unfinished, line 2: not a line of an evaluation"),
        Kept(tmp_path / "found.json") as kept,
    ):
        kept.begin({"model": "m"})


def test_results_that_were_kept_with_settings_in_one_key_are_taken_up(tmp_path: Path) -> None:
    """As every version up to 0.1 wrote them, before and after there were checksums."""
    header, task = {"pared_eval": 1, "settings": {"model": "m", "limit": None}}, {"task": "rte", "result": {"n": 4}}
    first, check = sealed(header)
    bare = b"".join(json.dumps(row).encode() + b"\n" for row in (header, task))
    for content in (first + sealed(task, check)[0], bare):
        (tmp_path / ".found.json.unfinished").write_bytes(content)
        with Kept(tmp_path / "found.json") as kept:
            kept.begin({"model": "m", "limit": None})
            assert kept.results(["rte"]) == [{"n": 4}]
            kept.add("piqa", {"n": 5})
        with Kept(tmp_path / "found.json") as kept, pytest.raises(ParedError, match="limit: None there, 1 now"):
            kept.begin({"model": "m", "limit": 1})
        with Kept(tmp_path / "found.json") as kept:
            kept.begin({"model": "m", "limit": None})
            assert kept.results(["rte", "piqa"]) == [{"n": 4}, {"n": 5}]
            kept.finish(["rte", "piqa"])
        assert list(tmp_path.iterdir()) == []


def test_kept_results_of_some_tasks_stay_when_others_are_done(tmp_path: Path) -> None:
    with Kept(tmp_path / "found.json") as kept:
        kept.begin({"model": "m"})
        kept.add("rte", {"accuracy": 0.5})
        kept.add("piqa", {"accuracy": 0.25})
        kept.finish(["rte"])
    with Kept(tmp_path / "found.json") as again:
        again.begin({"model": "m"})
        assert again.has("piqa")
        assert not again.has("rte")
        again.finish(["piqa"])
    assert list(tmp_path.iterdir()) == []


def test_two_runs_that_keep_beside_one_file_lost_each_others_results(tmp_path: Path) -> None:
    """Regression: the lock was held for a line, and the first run to end removed what the second had kept."""
    with Kept(tmp_path / "found.json") as first:
        first.begin({"model": "m"})
        with Kept(tmp_path / "found.json") as second:
            with pytest.raises(ParedError, match=r"another run is writing it; wait for it") as told:
                second.begin({"model": "m"})
            assert "remove" not in str(told.value)
        first.add("rte", {"accuracy": 0.5})
    with Kept(tmp_path / "found.json") as second:
        second.begin({"model": "m"})
        assert second.has("rte")


def test_a_run_killed_as_it_let_go_of_some_tasks_lost_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with Kept(tmp_path / "found.json") as kept:
        kept.begin({"model": "m"})
        kept.add("rte", {"accuracy": 0.5})
        kept.add("piqa", {"accuracy": 0.25})
        monkeypatch.setattr(os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            kept.finish(["rte"])
    with Kept(tmp_path / "found.json") as again:
        again.begin({"model": "m"})
        assert again.has("piqa")


def test_a_measure_that_keeps_nothing_removed_what_another_had_kept(tmp_path: Path) -> None:
    with Kept(tmp_path / "found.json") as kept:
        kept.begin({"model": "m"})
        kept.add("rte", {"accuracy": 0.5})
    with Kept(tmp_path / "found.json") as other:
        other.finish([])
    with Kept(tmp_path / "found.json") as again:
        again.begin({"model": "m"})
        assert again.has("rte")


def test_a_run_that_measured_nothing_leaves_nothing(tmp_path: Path) -> None:
    with Kept(tmp_path / "found.json") as kept:
        kept.begin({"model": "m"})
    assert list(tmp_path.iterdir()) == []


def test_kept_results_that_are_a_folder_are_told(tmp_path: Path) -> None:
    (tmp_path / ".found.json.unfinished").mkdir()
    with pytest.raises(ParedError, match="not a regular file"), Kept(tmp_path / "found.json") as kept:
        kept.begin({"model": "m"})


def test_a_file_replaced_while_it_was_opened_is_opened_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Regression: a lock on a file that was just removed kept nobody out."""
    path = tmp_path / "file"
    before, calls = locking.lock, []

    def lock_late(file: BinaryIO, busy: str) -> None:
        if not calls:
            path.unlink()
        calls.append(file)
        before(file, busy)

    monkeypatch.setattr(locking, "lock", lock_late)
    with locking.opened_alone(path, "file", "busy") as file:
        assert len(calls) == 2
        assert os.path.samestat(os.fstat(file.fileno()), path.stat())


@pytest.mark.parametrize("values", [5, ["x"], [[1]], [True], {"a": 1}, [float("nan")], None])
def test_a_line_of_a_search_with_odd_values_is_told(tmp_path: Path, values: Any) -> None:
    """Regression: a line without a checksum ended in a TypeError or a ValueError when it was asked for."""
    line = {"name": "candidate 0", "program": "p", "values": values}
    (tmp_path / "journal.jsonl").write_text(f'{{"pared_search": 1}}\n{json.dumps(line)}\n')
    with pytest.raises(ParedError, match="line 2: not a line of a search"):
        SearchJournal(tmp_path / "journal.jsonl", {})


@pytest.mark.parametrize("name", ["journal.jsonl", "seconds.jsonl"])
@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo])
def test_a_journal_that_is_no_file_is_told(tmp_path: Path, name: str, make: Callable[[Path], None]) -> None:
    """Regression: a pipe ended in UnsupportedOperation, a folder in IsADirectoryError."""
    make(tmp_path / name)
    with pytest.raises(ParedError, match=rf"{name}: not a regular file"):
        SearchJournal(tmp_path / "journal.jsonl", {})
    if name != "journal.jsonl":  # the first file was let go of
        (tmp_path / name).rmdir() if (tmp_path / name).is_dir() else (tmp_path / name).unlink()
        with SearchJournal(tmp_path / "journal.jsonl", {}):
            pass


# Where --json says.


def test_a_device_is_written_into_and_stays_one() -> None:
    """Regression: as root, --json /dev/null made an ordinary file of it."""
    before = os.stat("/dev/null")
    write_json(Path("/dev/null"), {"a": 1})
    assert os.stat("/dev/null").st_rdev == before.st_rdev
    assert Kept(Path("/dev/null")).path is None


@pytest.mark.parametrize("name", ["/dev/fd0", "/dev/std1", "/dev/fdout", "/dev/fd", "/proc/1/fd/1", "/proc/self/fd/in"])
def test_what_is_only_called_like_an_open_file_is_none(name: str) -> None:
    """Regression: --json /dev/fd0, a floppy disk, went to standard input, and another process's file to our own."""
    assert descriptor_of(Path(name)) is None


def test_every_name_of_an_open_file_is_known(tmp_path: Path) -> None:
    named = {"/dev/stdout": 1, "/dev/stderr": 2, "/dev/fd/7": 7, "/proc/self/fd/12": 12, f"/proc/{os.getpid()}/fd/3": 3}
    for number, (name, expected) in enumerate(named.items()):
        (tmp_path / str(number)).symlink_to(name)
        assert descriptor_of(Path(name)) == descriptor_of(tmp_path / str(number)) == expected


def test_open_files_are_written_into(tmp_path: Path) -> None:
    with (tmp_path / "told").open("w+") as file:
        file.write("before\n")
        file.flush()
        for name in (f"/dev/fd/{file.fileno()}", f"/proc/self/fd/{file.fileno()}"):
            write_json(Path(name), {"a": 1})
        (tmp_path / "link").symlink_to(f"/dev/fd/{file.fileno()}")
        write_json(tmp_path / "link", {"a": 2})
    assert (tmp_path / "told").read_text() == 'before\n{\n  "a": 1\n}\n{\n  "a": 1\n}\n{\n  "a": 2\n}\n'
    assert descriptor_of(Path("/dev/stdout")) == 1
    assert descriptor_of(Path("/dev/stderr")) == 2
    assert descriptor_of(tmp_path / "plain") is None


def test_a_pipe_is_written_into(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    read: list[str] = []
    reader = threading.Thread(target=lambda: read.append((tmp_path / "pipe").read_text()))
    reader.start()
    write_json(tmp_path / "pipe", {"a": 1})
    reader.join(timeout=10)
    assert json.loads(read[0]) == {"a": 1}
    assert not is_kept_on_disk(tmp_path / "pipe")


@pytest.mark.parametrize("there", [True, False])
def test_a_link_stays_one_and_its_target_is_replaced(tmp_path: Path, there: bool) -> None:
    target = tmp_path / "kept" / "target.json"
    target.parent.mkdir()
    if there:
        target.write_text("old")
        target.chmod(0o640)
    (tmp_path / "link.json").symlink_to(target)
    write_json(tmp_path / "link.json", {"a": 1})
    assert (tmp_path / "link.json").is_symlink()
    assert json.loads(target.read_text()) == {"a": 1}
    assert target.stat().st_mode & 0o777 == (0o640 if there else 0o644)
    assert [path.name for path in target.parent.iterdir()] == ["target.json"]


def test_a_loop_of_links_a_folder_and_a_long_name_are_refused_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    assert why_not_written(tmp_path) == "not a file in a folder that is there"
    assert why_not_written(tmp_path / "no" / "file") == "not a file in a folder that is there"
    assert "a name of 250 bytes" in str(why_not_written(tmp_path / ("n" * 250)))
    assert why_not_written(tmp_path / "file.json") is None


def test_a_file_that_cannot_be_written_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("old")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_whole(tmp_path / "file", "new")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("file", "old")]


def test_a_line_that_the_disk_has_no_room_for_leaves_the_journal_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, write = tmp_path / "journal", os.write
    written(path)
    before = path.read_bytes()

    def full(number: int, data: bytes) -> int:
        if len(data) > 10:
            return write(number, bytes(data[:10]))
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with Journal(path, HEADER, of="a test") as journal:
        with monkeypatch.context() as patched:
            patched.setattr(os, "write", full)
            with pytest.raises(ParedError, match=f"journal {path}: the disk is full"):
                journal.append({"name": "more"})
        assert path.read_bytes() == before
        journal.append({"name": "more"})  # once there is room again
    assert read(path) == [*ROWS, {"name": "more"}]


def test_an_interrupt_in_the_midst_of_a_line_leaves_no_half_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, write = tmp_path / "journal", os.write

    def interrupted(number: int, data: bytes) -> int:
        write(number, bytes(data[:10]))
        raise KeyboardInterrupt

    with Journal(path, HEADER, of="a test") as journal:
        journal.append(ROWS[0])
        with monkeypatch.context() as patched:
            patched.setattr(os, "write", interrupted)
            with pytest.raises(KeyboardInterrupt):
                journal.append(ROWS[1])
        journal.append(ROWS[2])
    assert read(path) == [ROWS[0], ROWS[2]]


def test_the_journal_of_another_run_is_refused_with_all_that_differs(tmp_path: Path) -> None:
    with Journal(tmp_path / "journal", {"journal": 1, "x": 0.5, "of": {"n": 1, "m": "a" * 64}}) as journal:
        journal.append(ROWS[0])
    with pytest.raises(ParedError, match=r"x: 0\.5 there, 0\.75 now, of\.m: 'a{12}…' there, 'b{12}…' now\)"):
        Journal(tmp_path / "journal", {"journal": 1, "x": 0.75, "of": {"n": 1, "m": "b" * 64}})
    with pytest.raises(ParedError, match=r"\(journal: 1 there, 2 now"):
        Journal(tmp_path / "journal", {"journal": 2, "x": 0.5})


def test_a_process_that_does_not_write_reads_what_is_written(tmp_path: Path) -> None:
    assert read_entries(tmp_path / "journal", "journal") == []
    with Journal(tmp_path / "journal", HEADER) as journal:
        for number, row in enumerate(ROWS):
            assert read_entries(tmp_path / "journal", "journal") == ROWS[:number]
            journal.append(row)


def test_all_lines_are_replaced_at_once(tmp_path: Path) -> None:
    written(tmp_path / "journal")
    with Journal(tmp_path / "journal", HEADER) as journal:
        journal.replace(row for row in ROWS[1:3])
        assert journal.entries == ROWS[1:3]
        journal.append(ROWS[0])
    assert read(tmp_path / "journal") == [*ROWS[1:3], ROWS[0]]
