"""Limits of memory are found where the system has them, and sizes are read as users write them."""

import os
import resource
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from pared import memory
from pared.errors import ParedError
from pared.memory import CHOSEN, _c_library, available_memory, format_size, parse_size


@pytest.mark.parametrize(
    ("text", "expected"),
    [("2GiB", 2 * 2**30), ("500MB", 500 * 10**6), ("1.5 gib", 3 * 2**29), ("123", 123), (4096, 4096), ("0", 0),
     ("7 B", 7), ("2TiB", 2**41)],
)  # fmt: skip
def test_sizes_are_read(text: str | int, expected: int) -> None:
    assert parse_size(text, "--activation-memory") == expected


@pytest.mark.parametrize("text", ["", "many", "2 GX", "-1", "1e9", "2,5GB", True, "nan"])
def test_what_is_no_size_is_told(text: str) -> None:
    with pytest.raises(ParedError, match="--activation-memory: expected a size such as 2GiB or 500MB, got"):
        parse_size(text, "--activation-memory")


def test_sizes_are_printed() -> None:
    assert [format_size(count) for count in (10, 1536, 5 * 2**20, 7 * 2**30, 3 * 2**41)] == [
        "10 B", "1.5 KiB", "5.0 MiB", "7.0 GiB", "6.0 TiB",
    ]  # fmt: skip


def _system(monkeypatch: pytest.MonkeyPatch, folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    monkeypatch.setattr(memory, "PROC", folder / "proc")
    monkeypatch.setattr(memory, "GROUPS", folder / "groups")
    monkeypatch.setattr(resource, "getrlimit", lambda _: (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


MEMINFO = {"proc/meminfo": "MemTotal:  9000 kB\nMemAvailable:  8000 kB\n"}
SECOND = {
    "proc/self/cgroup": "0::/outer/inner\n",
    "groups/outer/memory.max": "5000000\n",
    "groups/outer/memory.current": "2000000\n",
    "groups/outer/memory.stat": "anon 1\ninactive_file 1000000\n",
    "groups/outer/inner/memory.max": "max\n",
    "groups/outer/inner/memory.current": "2000000\n",
}
FIRST = {
    "proc/self/cgroup": "4:cpu,memory:/job\n3:cpuset:/\n",
    "groups/memory/memory.limit_in_bytes": f"{2**63 - 4096}\n",
    "groups/memory/memory.usage_in_bytes": "7\n",
    "groups/memory/job/memory.limit_in_bytes": "3000000\n",
    "groups/memory/job/memory.usage_in_bytes": "1000000\n",
    "groups/memory/job/memory.stat": "inactive_file 5\ntotal_inactive_file 500000\n",
}


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        (MEMINFO, (8000 * 1024, "the memory of this machine")),
        ({**MEMINFO, **SECOND}, (4000000, "the limit of its control group")),
        ({**MEMINFO, **FIRST}, (2500000, "the limit of its control group")),
    ],
    ids=["machine", "groups of version 2", "groups of version 1"],
)
def test_the_tightest_limit_is_found(
    files: dict[str, str], expected: tuple[int, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _system(monkeypatch, tmp_path, files)
    assert available_memory() == expected


def test_the_limit_of_the_address_space_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _system(monkeypatch, tmp_path, {**MEMINFO, "proc/self/statm": "100 50 10\n"})
    monkeypatch.setattr(resource, "getrlimit", lambda _: (101 * resource.getpagesize(), resource.RLIM_INFINITY))
    assert available_memory() == (resource.getpagesize(), "the limit of its address space")


def test_this_machine_has_some() -> None:
    found = available_memory()
    assert found is None or found.bytes > 0


def test_memory_that_is_free_goes_back_to_the_system() -> None:
    """Regression: a walk over 28 blocks of 200 MB was killed at 4 GiB, most of which was free and kept by malloc."""
    code = (
        "from pared.memory import give_back\n"
        "def held():\n"
        "    line = next(one for one in open('/proc/self/status') if one.startswith('RssAnon'))\n"
        "    return int(line.split()[1]) // 1024\n"
        "pieces = [bytearray(b'x' * 100_000) for _ in range(4_000)]\n"
        "full = held()\n"
        "last = pieces.pop()\n"  # behind the others, so that the heap cannot shrink at its end
        "del pieces\n"
        "give_back()\n"
        "print(full - held())\n"
    )
    if not sys.platform.startswith("linux") or _c_library() is None:
        pytest.skip("only glibc keeps what is free")
    freed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert int(freed) > 300


def test_a_batch_as_large_as_the_last_one_takes_no_new_pages_where_what_is_freed_is_kept() -> None:
    """Regression: every tensor of a forward pass was taken from the system page by page, a quarter of its time."""
    code = (
        "import resource, sys\n"
        "from pared.memory import keep_freed\n"
        "if sys.argv[1] == 'kept': keep_freed()\n"
        "def batch():\n"
        "    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "    pieces = [b'x' * 12_000_000 for _ in range(8)]\n"
        "    del pieces\n"
        "    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before\n"
        "batch(), batch()\n"
        "print(batch())\n"
    )
    if not sys.platform.startswith("linux") or _c_library() is None:
        pytest.skip("only glibc has these settings")
    plain = {name: value for name, value in os.environ.items() if name not in CHOSEN}

    def pages(how: str, **chosen: str) -> int:
        words = [sys.executable, "-c", code, how]
        return int(subprocess.run(words, capture_output=True, text=True, check=True, env=plain | chosen).stdout)

    assert pages("kept") < 100 < pages("as it is")
    assert pages("kept", MALLOC_TRIM_THRESHOLD_="0") > 100  # a user's own choice stays


def test_an_older_c_library_is_asked_every_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Regression: where it does not say how much is free, memory was returned once and never again."""
    trimmed: list[int] = []
    monkeypatch.setattr(memory, "_c_library", lambda: SimpleNamespace(malloc_trim=trimmed.append))
    for _ in range(3):
        memory.give_back()
    assert trimmed == [0, 0, 0]
