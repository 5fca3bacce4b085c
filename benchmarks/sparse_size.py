"""How small is a sparse folder on disk, and how long does it take to load?

    python benchmarks/sparse_size.py              # measures, appends JSON lines, renders docs/results/sparse_size.md
    python benchmarks/sparse_size.py --quick      # one pattern, few loads; prints its page and writes nothing
    python benchmarks/sparse_size.py --render     # renders only

The embedded model in bfloat16, pruned and saved by `pared.run`; the dense folder is that of `pared export`. Bytes are
those of the tensors of target modules. Loads are interleaved (dense, sparse, dense, sparse ...), single-threaded, of
files that were just read; a ratio is that of a load to the mean of its two neighbours. A dense load maps the file and
reads nothing of it, so the time to the first answer, the load and one token, is reported beside it.
"""

import argparse
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

import pared
from pared.entrypoints.export import export_dense
from pared.schema.manifest import Manifest
from record import RESULTS, append, provenance, read, spread, table

LINES = RESULTS / "sparse_size.jsonl"
PAGE = RESULTS / "sparse_size.md"
MODEL, DTYPE = "embedded:smollm2-135m", "bfloat16"
BUDGETS: dict[str, dict[str, Any]] = {
    "50%, anywhere": {"sparsity": 0.5},
    "2:4": {"pattern": "2:4"},
    "4:8": {"pattern": "4:8"},
}
MOST_BYTES, MOST_SECONDS = 0.57, 2.0  # of the dense folder's


def bytes_of(folder: Path, sites: Iterable[str]) -> int:
    """Return the bytes of the tensors of these sites, biases with them."""
    owners, total = set(sites), 0
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - not a mapping
                if name.rpartition(".")[0] in owners:
                    total += tensors.get_tensor(name).nbytes
    return total


@torch.inference_mode()
def seconds_to(folder: Path) -> tuple[float, float]:
    """Return the seconds until the model is loaded, and until it has answered one token."""
    start = time.perf_counter()
    model = pared.load(folder)
    loaded = time.perf_counter() - start
    model(input_ids=torch.ones(1, 1, dtype=torch.long))
    return loaded, time.perf_counter() - start


def compare(dense: Path, sparse: Path, rounds: int) -> dict[str, list[float]]:
    """Return seconds of the dense folder, and ratios of the other's to them, to the load and to the first answer."""
    for folder in (dense, sparse):
        seconds_to(folder)
    found: dict[str, list[float]] = {name: [] for name in ("load_seconds", "load", "answer_seconds", "answer")}
    for _ in range(rounds):
        before, changed, after = seconds_to(dense), seconds_to(sparse), seconds_to(dense)
        for place, name in enumerate(("load", "answer")):
            found[f"{name}_seconds"] += [before[place], after[place]]
            found[name].append(2 * changed[place] / (before[place] + after[place]))
    return found


def measure(budget: str, method: str, dense: Path, place: Path, rounds: int) -> dict[str, Any]:
    recipe = pared.Recipe.of({"model": MODEL, "method": method, "dtype": DTYPE, "evaluation": None,
                              "calibration": {"samples": 16, "length": 512}, "out": str(place / "small"),
                              **BUDGETS[budget]})  # fmt: skip
    folder = Path(pared.run(recipe).folder)
    sites = [site.name for site in Manifest.read(folder).plan.sites]
    times = compare(dense, folder, rounds)
    files = {name: sum(file.stat().st_size for file in where.glob("*.safetensors"))
             for name, where in (("dense", dense), ("sparse", folder))}  # fmt: skip
    covered = {"dense": bytes_of(dense, sites), "sparse": bytes_of(folder, sites)}
    shutil.rmtree(folder)
    return {"budget": budget, "method": method, "sites": len(sites), "covered": covered, "files": files,
            "times": times, "load": os.getloadavg()[0]}  # fmt: skip


def page(lines: Sequence[dict[str, Any]]) -> str:
    newest = {one["budget"]: one for one in lines}
    last = lines[-1]
    rows, met = [], True
    for budget in [budget for budget in BUDGETS if budget in newest]:
        one = newest[budget]
        share = one["covered"]["sparse"] / one["covered"]["dense"]
        met &= share <= MOST_BYTES and statistics.median(one["times"]["load"]) <= MOST_SECONDS
        rows.append((budget, f"{one['covered']['dense']:,}", f"{one['covered']['sparse']:,}", f"**{share:.4f}**",
                     f"{one['files']['sparse'] / one['files']['dense']:.3f}", f"**{spread(one['times']['load'])}**",
                     spread(one["times"]["load_seconds"]), spread(one["times"]["answer"]),
                     spread(one["times"]["answer_seconds"])))  # fmt: skip
    header = (
        "zeros",
        "covered bytes, dense",
        "sparse",
        "ratio",
        "whole file, ratio",
        "load, ratio",
        "dense load, s",
        "first answer, ratio",
        "dense first answer, s",
    )
    return "\n".join([
        "# How small is a sparse folder?",
        "",
        "Made by `python benchmarks/sparse_size.py`; raw figures in [sparse_size.jsonl](sparse_size.jsonl). "
        "Do not edit.",
        "",
        f"`{MODEL}` in {DTYPE}, pruned with `{last['method']}` and saved, against the same model as a plain folder. "
        f"Bytes of the tensors of the {last['sites']} covered layers, where half of 16 bits and one bit a weight make "
        "0.5625; embeddings are stored as they were, and count in the whole file. Loading is `pared.load` of files in "
        "the page cache, one thread; median (least to most). A dense load maps the file and reads no weight, a sparse "
        "one unpacks all; the first answer is the load and one token.",
        "",
        f"Bars: bytes at most {MOST_BYTES} and load time at most {MOST_SECONDS:g} times those of the dense folder: "
        f"**{'met' if met else 'not met'}**.",
        "",
        table(header, rows),
        "",
        f"Commit {last['commit']}, {last['date']}, {last['cpu']}, {last['threads']} thread, torch {last['torch']}, "
        f"transformers {last['transformers']}, Python {last['python']}. The machine was {last['load']:.1f} busy (load "
        "average) when the last row was measured.",
        "",
    ])  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--render", action="store_true")
    only.add_argument("--quick", action="store_true")
    parser.add_argument("--method", default="magnitude", help="sizes are the same for any; magnitude needs no data")
    parser.add_argument("--rounds", type=int, default=11)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    if asked.render:
        PAGE.write_text(page(read(LINES)), encoding="utf-8")
        return
    quick = []
    with tempfile.TemporaryDirectory() as place:
        dense = Path(place) / "dense"
        export_dense(MODEL, dense, DTYPE)
        for budget in list(BUDGETS)[: 1 if asked.quick else None]:
            row = measure(budget, asked.method, dense, Path(place), 3 if asked.quick else asked.rounds)
            quick.append({**row, **provenance()})
            if not asked.quick:
                append(LINES, row)
            print(budget, row["covered"], spread(row["times"]["load"]), flush=True)
    if asked.quick:
        print(page(quick))
    else:
        PAGE.write_text(page(read(LINES)), encoding="utf-8")


if __name__ == "__main__":
    main()
