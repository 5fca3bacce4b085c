"""Commands under a hard limit of memory: a control group of the kernel, which kills what exceeds it."""

import os
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

PLACES = (Path("/sys/fs/cgroup/memory"), Path("/tmp/pared-cgroup"))  # the second is mounted by whoever may


def run_capped(
    command: Sequence[str], cap: int | None, environment: Mapping[str, str] | None = None, log: Path | None = None
) -> dict[str, Any]:
    """Run a command with at most ``cap`` bytes of memory, those of its page cache included.

    Args:
        command: with its arguments.
        cap: bytes; None for no limit.
        environment: on top of this process's.
        log: where its output goes.

    Returns:
        ``exit``, ``seconds``, ``peak_rss`` (bytes, of the process), and with a cap ``peak_group`` (bytes, page cache
        included) and ``enforced``: by what; ``none`` where the kernel lets this user set no limit.
    """
    group, how = (None, "nothing was asked") if cap is None else _group(cap)

    def join() -> None:
        if group is not None:
            (group / "cgroup.procs").write_text(str(os.getpid()))

    start = time.perf_counter()
    out = open(log, "ab") if log is not None else subprocess.DEVNULL  # noqa: SIM115 - closed below
    try:
        process = subprocess.Popen(
            command, env={**os.environ, **(environment or {})}, stdout=out, stderr=subprocess.STDOUT, preexec_fn=join
        )
        _, status, used = os.wait4(process.pid, 0)
    finally:
        if log is not None:
            out.close()  # type: ignore[union-attr]
    told: dict[str, Any] = {"exit": os.waitstatus_to_exitcode(status), "seconds": time.perf_counter() - start}
    told["peak_rss"] = used.ru_maxrss * 1024
    if group is not None:
        told["peak_group"] = int((group / "memory.max_usage_in_bytes").read_text())
        with suppress(OSError):
            group.rmdir()
    return told | {"enforced": how}


def _group(cap: int) -> tuple[Path | None, str]:
    """Make a control group with this limit, where the kernel allows it."""
    for place in PLACES:
        if place == PLACES[-1] and not (place / "cgroup.procs").exists():
            place.mkdir(exist_ok=True)
            subprocess.run(
                ["mount", "-t", "cgroup", "-o", "memory", "none", str(place)], check=False, capture_output=True
            )
        group = place / f"pared-{os.getpid()}-{time.monotonic_ns()}"
        try:
            group.mkdir()
            (group / "memory.limit_in_bytes").write_text(str(cap))
        except OSError:
            continue
        return group, "memory control group"
    return None, "none"
