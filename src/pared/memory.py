"""How much memory this process may still take, and sizes as users write them."""

import contextlib
import ctypes
import functools
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple

from pydantic import ByteSize, TypeAdapter, ValidationError

from pared.errors import ParedError

GROUPS = Path("/sys/fs/cgroup")
PROC = Path("/proc")
WORTH_RETURNING = 256 * 2**20  # bytes that are free: fewer stay with the process
APART = 32 * 2**20  # bytes of a piece of memory that is taken from the system alone, and goes back when it is freed
# Parameters of ``mallopt`` (malloc.h), and what of the environment says that a user has chosen his own.
TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3
CHOSEN = ("GLIBC_TUNABLES", "MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TOP_PAD_", "LD_PRELOAD")
NO_LIMIT = 2**60  # what is more is none: groups without a limit have the largest number of pages

Stream = Literal["auto", "on", "off"]

# torch on a CPU has no type of its own for a lack of memory; the C++ library's and Python's have these names.
_LACKING = ("can't allocate memory", "not enough memory", "std::bad_alloc")
_LACKING_TYPES = ("OutOfMemoryError", "MemoryError")

_SIZE = TypeAdapter(ByteSize)
_SHAPE = re.compile(r"\s*[0-9.]+\s*[a-zA-Z]*\s*")


class Available(NamedTuple):
    """Memory that may still be taken.

    Attributes:
        bytes: of it.
        limit: what sets the limit, for messages.
    """

    bytes: int
    limit: str


class _Heap(ctypes.Structure):
    """What ``mallinfo2`` of glibc 2.33 and later tells: ten sizes, of which the free bytes are one."""

    _fields_ = [(name, ctypes.c_size_t) for name in
                ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks",
                 "keepcost")]  # fmt: skip


@functools.cache
def _c_library() -> ctypes.CDLL | None:
    try:
        found = ctypes.CDLL(None)
        found.malloc_trim(0)
    except (OSError, AttributeError, TypeError):
        return None
    if hasattr(found, "mallinfo2"):
        found.mallinfo2.restype = _Heap
    return found


def keep_freed() -> None:
    """Let this process keep some memory that it frees, as the next batch takes as much (glibc; else nothing is done).

    By default whatever is freed at the end of the heap goes back to the system at once, and is taken anew page by page:
    on a virtual machine a quarter of a forward pass. What environment variables say of it stays as it is.
    """
    library = _c_library()
    if library is not None and hasattr(library, "mallopt") and not any(name in os.environ for name in CHOSEN):
        library.mallopt(MMAP_THRESHOLD, APART)
        library.mallopt(TRIM_THRESHOLD, WORTH_RETURNING)


def give_back() -> None:
    """Return memory that is free to the system, where the C library keeps more of it than is worth keeping (glibc).

    It keeps pieces below 32 MiB that were freed, which a walk over many blocks takes and frees in ever other sizes:
    without this a model of 28 blocks of 200 MB held 3 GB of free memory after ten of them. What goes back has to be
    taken anew page by page, so that it goes when there is enough of it since this was last done.
    """
    global _idle_before
    library = _c_library()
    if library is None:
        return
    if not hasattr(library, "mallinfo2"):  # an older library does not say how much is free
        library.malloc_trim(0)
    elif _idle(library) >= _idle_before + WORTH_RETURNING:
        library.malloc_trim(0)
        _idle_before = _idle(library)


_idle_before = -WORTH_RETURNING  # of the last time; the first time memory is returned whatever there is


def _idle(library: ctypes.CDLL) -> int:
    """Return the bytes of this process's own memory that nothing is in, and some that is not the C library's.

    What was returned still counts as free in the library, so that it is the system that is asked.
    """
    heap = library.mallinfo2()
    resident, shared = (int(pages) for pages in Path("/proc/self/statm").read_text().split()[1:3])
    return (resident - shared) * os.sysconf("SC_PAGE_SIZE") - heap.uordblks - heap.hblkhd


def lacks_memory(error: BaseException) -> bool:
    """Whether an exception is a lack of memory, of a device or of the machine. Nothing is imported to tell."""
    if any(kind.__name__ in _LACKING_TYPES for kind in type(error).__mro__):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _LACKING)


def parse_size(text: str | int, what: str) -> int:
    """Return the bytes of a size: ``2GiB``, ``500MB``, ``1.5 GiB`` or a number of bytes.

    Args:
        text: as it was given.
        what: is so large, for messages.

    Raises:
        ParedError: it is no size.
    """
    with contextlib.suppress(ValidationError):
        # The type reads what it knows of "2,5GB" and leaves the rest.
        if _SHAPE.fullmatch(str(text)) and (found := _SIZE.validate_python(text)) >= 0:
            return int(found)
    raise ParedError(f"{what}: expected a size such as 2GiB or 500MB, got {str(text)[:40]!r}")


def format_size(count: int) -> str:
    """Return bytes as people read them: ``1.4 GiB``."""
    size = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(size) < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


def available_memory() -> Available | None:
    """Return the least that any limit leaves: of this machine, of a container, of the process; None if none is known.

    Pages of files that the kernel can release at once count as free.
    """
    found = [*_of_machine(), *_of_groups(), *_of_process()]
    return min(found) if found else None


def streams(asked: Stream, needed: int) -> bool:
    """Whether a model is read block by block.

    Args:
        asked: ``auto`` for where memory does not hold it.
        needed: bytes that it would take as a whole.
    """
    available = available_memory() if asked == "auto" else None
    return asked == "on" or (available is not None and needed > available.bytes)


def _of_machine() -> Iterator[Available]:
    told = _read(PROC / "meminfo")
    if match := re.search(r"^MemAvailable:\s+(\d+) kB", told, re.MULTILINE):
        yield Available(int(match[1]) * 1024, "the memory of this machine")
    elif hasattr(os, "sysconf") and "SC_AVPHYS_PAGES" in os.sysconf_names:
        yield Available(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), "the memory of this machine")


def _of_groups() -> Iterator[Available]:
    """Yield what control groups leave, of both versions: those of the process and every group around them."""
    for line in _read(PROC / "self" / "cgroup").splitlines():
        _, controllers, path = (*line.split(":", 2), "", "")[:3]
        if controllers == "":
            root, limit, usage, idle = GROUPS, "memory.max", "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):
            root, limit, usage, idle = (
                GROUPS / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"
            )  # fmt: skip
        else:
            continue
        parts = [part for part in path.split("/") if part and part != ".."]
        for depth in range(len(parts) + 1):  # a container may see its own group as the root
            group = root.joinpath(*parts[:depth])
            most, used = _number(group / limit), _number(group / usage)
            if most is None or used is None or most >= NO_LIMIT:
                continue
            match = re.search(rf"^{idle} (\d+)", _read(group / "memory.stat"), re.MULTILINE)
            yield Available(max(0, most - used + (int(match[1]) if match else 0)), "the limit of its control group")


def _of_process() -> Iterator[Available]:
    try:
        import resource  # not on Windows
    except ImportError:
        return
    soft, _ = resource.getrlimit(resource.RLIMIT_AS)
    told = _read(PROC / "self" / "statm").split()
    if soft not in (resource.RLIM_INFINITY, -1) and told:
        yield Available(max(0, soft - int(told[0]) * os.sysconf("SC_PAGE_SIZE")), "the limit of its address space")


def _number(file: Path) -> int | None:
    told = _read(file).strip()
    return int(told) if told.isdigit() else None


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="ascii", errors="replace")
    except OSError:
        return ""
