"""What every benchmark shares: JSON lines with the commit and the machine, and medians with their spread."""

import datetime
import json
import platform
import statistics
import subprocess
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import transformers

Line = dict[str, Any]  # one cell of a page, as it is in the file
UNSHRUNK = {"input_shrinkage": 0.0, "output_shrinkage": 0.0}
ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "docs" / "results"


def ranks_alone(**options: Any) -> dict[str, Any]:
    """Return the fields of ``loss-optimal`` with ranks alone and statistics as they are, which pages call by that name.

    Args:
        options: others of the method.
    """
    return {"method": "loss-optimal", "structures": "ranks", "options": {**UNSHRUNK, **options}}


def provenance() -> dict[str, Any]:
    """Return the commit, the machine and the versions a figure depends on."""

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    changed = git("status", "--porcelain", "--", "src", "benchmarks")
    return {
        "commit": git("rev-parse", "--short", "HEAD") + ("+changes" if changed else ""),
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "cpu": _cpu(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


def append(path: Path, row: dict[str, Any]) -> None:
    """Add one JSON line with its provenance."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as lines:
        lines.write(json.dumps({**row, **provenance()}) + "\n")


def alone(function: Callable[..., Any], *arguments: Any) -> Any:
    """Return what a function does in a fresh process."""
    with ProcessPoolExecutor(1, get_context("spawn")) as one:
        return one.submit(function, *arguments).result()


def read(path: Path) -> list[dict[str, Any]]:
    """Return the JSON lines of a file, none if it is not there."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def spread(values: Sequence[float], digits: int = 2) -> str:
    """Return ``median (least to most)``."""
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Return a Markdown table; every column but the first is right-aligned."""
    lines = ["| " + " | ".join(header) + " |", "|---" + "|---:" * (len(header) - 1) + "|"]
    lines += ["| " + " | ".join(map(str, row)) + " |" for row in rows]
    return "\n".join(lines)


def _cpu() -> str:
    try:
        names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        return names[0].partition(":")[2].strip()
    except (OSError, IndexError):
        return platform.processor()
